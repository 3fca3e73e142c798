"""How much memory there is, for the device and for this process, and what to do when it does not suffice."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from globe.errors import GlobeError, OutOfMemoryError
from globe.units import byte_size

_PROC = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")

FITS_EXHAUSTED = (
    "let fewer layers share a bank (--scope, --max-experts), read them one at a time (--stream), or choose another "
    "--device; what is finished is kept"
)
"""What to do when a fit does not fit."""


def total_memory(device: str = "cpu") -> tuple[int, str]:
    """Bytes that may be used at most for what is on the device, and whose bound that is.

    Of a GPU, what is free on it; else the smallest of the machine's memory, the limits of the process's control group
    and of those above it (a container's), and the process's own limits of address space and of data.
    """
    if device.partition(":")[0] == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free, f"{device} has {byte_size(free)} free"
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = min(_group_limits(), default=machine)
    bounds = [(machine, "this machine has {}"), (group, "this container or control group may use {}")]
    for kind, option in ((resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")):
        process, _ = resource.getrlimit(kind)
        if process != resource.RLIM_INFINITY:
            bounds.append((process, f"this process may use {{}} (ulimit {option})"))
    least, whose = min(bounds, key=lambda bound: bound[0])
    return least, whose.format(byte_size(least))


def _group_limits() -> Iterator[int]:
    """The memory limits of the process's control groups and all above them, of either version of the hierarchy."""
    with contextlib.suppress(OSError):
        for line in _PROC.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                roots, file = (_GROUPS, _GROUPS / "unified"), "memory.max"
            elif "memory" in controllers.split(","):
                roots, file = (_GROUPS / "memory",), "memory.limit_in_bytes"
            else:
                continue
            own = Path(path.lstrip("/"))
            for root in roots:
                # inside a container the path may be the host's, and its own group the root of what is mounted
                for group in (own, *own.parents):
                    with contextlib.suppress(OSError, ValueError):  # `max`: no limit
                        yield int((root / group / file).read_text())


@contextlib.contextmanager
def explained_exhaustion(doing: str, advice: str) -> Iterator[None]:
    """Turn whatever says that memory ran out into an `OutOfMemoryError`; all else passes."""
    try:
        yield
    except GlobeError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_exhaustion(error):
            raise
        raise OutOfMemoryError(f"memory ran out while {doing} ({_first_line(error)}): {advice}") from error


def is_exhaustion(error: BaseException) -> bool:
    """Whether an error of Python, torch or the system says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
