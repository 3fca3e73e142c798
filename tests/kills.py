"""Kill a command before each of its calls that change the file system, repeat it, and compare what comes out.

    python -m tests.kills [compress[-stream|-coded|-packed]] [sweep] [export] [export-coded] [race]

Prints, for each command, how many calls it makes and how many of the kills ended in the bytes of an undisturbed run.
Processes are forked from one that has imported everything; a kill is SIGKILL, from an audit hook. `race` starts two
compressions into one folder at once, 50 times, and counts how often one made the model and the other was told.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.digest import file_sha256
from globe.checkpoint.manifest import MANIFEST, verify_files
from globe.cli.main import main
from tests.tiny_sources import write_source

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
TIMES = {"seconds", "peak_memory_bytes", "phases"}
QUICK = ("--steps", "2", "--keep", "0.7", "--calibrate", "none")
CODED = ("--bits", "3")
PACKED = ("--format", "compressed-tensors", "--calibrate", "none")
SWEEP = (
    *(
        "--keep",
        "0.7",
        "0.5",
        "--layers",
        "3",
        "--common.steps",
        "1",
        "--common.calibrate",
        "none",
        "--common.allocation",
        "uniform",
    ),
    *("--evaluate.max-tokens", "64", "--evaluate.length", "32"),
)


def is_change(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in EVENTS


def run(arguments: list[str], root: Path, kill_before: int | None) -> tuple[int, int]:
    """Run a command in a forked process; returns its wait status and the changes that it made below `root`."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        count = 0

        def hook(event: str, details: tuple[Any, ...]) -> None:
            nonlocal count
            if is_change(event, details) and str(details[0]).startswith(str(root)):
                count += 1
                if count == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 70
        with contextlib.suppress(BaseException):
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
            sys.addaudithook(hook)
            status = main(arguments)
        os.write(writer, str(count).encode())
        os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with open(reader, "rb") as pipe:  # noqa: PTH123
        said = pipe.read()
    return status, int(said or 0)


def content(folder: Path) -> dict[str, Any]:
    """What must come out alike: all bytes, but for times and what follows from them."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json" and (name == "report.json" or name.startswith("points/")):
            found[name] = without_times(json.loads(path.read_text()))
        elif path.is_file() and name not in (MANIFEST, "sweep.csv"):
            found[name] = file_sha256(path)
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in {*TIMES, "sha256"}}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def kill_everywhere(arguments: Callable[[Path], list[str]], scratch: Path, every: int = 1) -> tuple[int, list[int]]:
    """The calls of a command that change files, and those before which a kill did not end in the same bytes."""
    reference = scratch / "reference"
    reference.mkdir()
    status, calls = run(arguments(reference / "out"), reference, None)
    assert status == 0, "the command fails undisturbed"
    expected, failed = content(reference / "out"), list[int]()
    for call in range(1, calls + 1, every):
        root = scratch / f"killed-{call}"
        root.mkdir()
        status, _ = run(arguments(root / "out"), root, call)
        assert os.WIFSIGNALED(status), f"call {call} was not made again"
        status, _ = run(arguments(root / "out"), root, None)
        with contextlib.suppress(Exception):
            verify_files(root / "out")
            if status == 0 and content(root / "out") == expected and [p.name for p in root.iterdir()] == ["out"]:
                shutil.rmtree(root)
                continue
        failed.append(call)
    return calls, failed


def race(arguments: Callable[[Path], list[str]], scratch: Path, times: int = 50) -> int:
    """How often, of two runs started at once, one made the output and the other ended in a message."""
    won = 0
    for number in range(times):
        out, children = scratch / f"race-{number}", list[int]()
        for _ in range(2):
            if (child := os.fork()) == 0:
                status = 70
                with contextlib.suppress(BaseException):
                    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
                    status = main(arguments(out))
                os._exit(status)
            children.append(child)
        statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        verify_files(out)
        won += statuses in ([0, 1], [0, 0]) and not list(scratch.glob("*.partial"))  # 0 also says: finished already
    return won


def commands(scratch: Path) -> dict[str, Callable[[Path], list[str]]]:
    write_source(scratch / "source")
    main(["compress", str(scratch / "source"), "-o", str(scratch / "small"), *QUICK])
    main(["compress", str(scratch / "source"), "-o", str(scratch / "coded"), *CODED])
    source, small, coded = str(scratch / "source"), str(scratch / "small"), str(scratch / "coded")
    return {
        "compress": lambda out: ["compress", source, "-o", str(out), *QUICK],
        "compress-stream": lambda out: ["compress", source, "-o", str(out), *QUICK, "--scope", "model", "--stream"],
        "compress-coded": lambda out: ["compress", source, "-o", str(out), *CODED],
        "compress-packed": lambda out: ["compress", source, "-o", str(out), *PACKED],
        "sweep": lambda out: ["sweep", "shipped", "-o", str(out), *SWEEP],
        "export": lambda out: ["export", small, "-o", str(out)],
        "export-coded": lambda out: ["export", coded, "-o", str(out)],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        known = commands(scratch)
        for name in sys.argv[1:] or [*known, "race"]:
            (scratch / name).mkdir()
            if name == "race":
                print(f"race: {race(known['compress'], scratch / name)} of 50 ended with one model and one message")
                continue
            calls, failed = kill_everywhere(known[name], scratch / name)
            print(
                f"{name}: {calls} calls, {calls - len(failed)} gone on with to the same bytes; not: {failed}",
                flush=True,
            )
