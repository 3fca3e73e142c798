"""How a command ends: an exit status, and one paragraph on stderr unless all went well."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from rich.text import Text

from globe.terminal import Terminal, one_line
from globe.version import versions

FAILED, BUG, CLOSED = 1, 70, 141
_PACKAGE = Path(__file__).parents[1]


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end, raised where Ctrl-C would be."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise `Stopped`, unless they are ignored (nohup) or handled already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise Stopped(number)


def tell(kind: str, message: str, style: str = "red") -> None:
    """Print one paragraph on stderr, if anyone reads that."""
    with contextlib.suppress(BrokenPipeError):
        Terminal(stderr=True, soft_wrap=True).print(Text(f"{kind}: ", style), one_line(message), sep="")


def tell_stopped(stop: KeyboardInterrupt, go_on: str) -> int:
    """Say what ended the command and how to go on; returns the exit status that shells give to the signal."""
    number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
    how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    tell(how, go_on or "nothing is left to go on with; give the command again", "yellow")
    return 128 + number


def tell_bug(error: Exception, arguments: Sequence[str], go_on: str) -> int:
    """Say that what happened is a fault of GloBE's own and where its traceback is; returns the exit status."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)] or frames
    place = f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else "an unknown place"
    reason = str(error).strip().splitlines()
    what = f"{type(error).__name__}{f': {reason[0][:200]}' if reason else ''}"
    tell(
        "bug",
        f"{what} (in {place}). This is a fault of GloBE {versions()['globe']} and not of yours: please report it at "
        f"the issue tracker of the repository that GloBE came from, with {_saved(error, arguments)}"
        + (f". {go_on}" if go_on else ""),
    )
    return BUG


def _saved(error: Exception, arguments: Sequence[str]) -> str:
    """Where the traceback is: in a file, or, where none can be written, in the words that follow."""
    lines = [f"globe {shlex.join(arguments)}", repr(versions()), *traceback.format_exception(error)]
    content = "\n".join(lines).encode(errors="backslashreplace")
    try:
        handle, name = tempfile.mkstemp(".txt", "globe-traceback-")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except OSError:
        return "this traceback:\n" + content.decode()
    return f"{name}, which has the command, the versions and the traceback"


def close_quietly() -> int:
    """Nobody reads stdout any more, as behind `| head`: let nothing else be said about that; returns the status."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CLOSED


def describe(error: OSError) -> str:
    """What the file system says, with the path it says it of."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason
