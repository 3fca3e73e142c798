"""Mutated files: every file that GloBE reads is changed, at random, and a command that reads it run on it.

    python -m tests.fuzz --mutations 20000 --seed 0

A mutation passes if the command ends well or in one paragraph (a `GlobeError`, or what the file system says). It
counts against GloBE if the command ends in a fault of its own, is killed, or takes more than two seconds of processor
time or a gigabyte of memory beyond what it takes to start. Each runs in a fork of this process, all imported and
nothing shared. The exit status is 1 if any counts; a case is run again, loudly, by its number:

    python -m tests.fuzz --seed 0 --only 123
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from globe.cli import main as cli
from globe.experts.streamed import StreamedExperts
from globe.quant import trellis
from globe.run import compensation, scope
from globe.terms import FAMILIES
from tests.conformance.quantise import write_quantised
from tests.tiny_sources import write_source

MOST_SECONDS, MOST_BYTES, DEADLINE = 2.0, 1_000_000_000, 30.0
SOURCE, SMALL, TEXT = "source", "small", "text.txt"
BARE = ("--calibrate", "none", "--allocation", "uniform")
CALIBRATED = ("--calibrate", TEXT, "--calibration-tokens", "256")
FIT = ("--keep", "0.7", "--steps", "1")
CODE = ("--bits", "3")
PACK = ("--format", "compressed-tensors")
JUDGE = ("--text", TEXT, "--length", "16", "--max-tokens", "64")
SWEEP = ("sweep", SOURCE, "-o", "grid", "--keep", "0.7", "0.6", "--common.calibrate", "none", "--common.steps", "1",
         "--common.allocation", "uniform", *(f"--evaluate.{word.lstrip('-')}" if word.startswith("--") else word
                                             for word in JUDGE))  # fmt: skip
INSPECT = ("inspect", SOURCE, "--plan", *FIT, *BARE)
COMPRESS = ("compress", SOURCE, "-o", "out", *FIT, *BARE)
COMPRESS_CODED = ("compress", SOURCE, "-o", "out", *CODE, *BARE)
LOAD = ("load", SMALL)

NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 1.5, -0.5, 1e9, 10**9, 2**31, 2**63 - 1, 2**63, 10**30, -(10**9), 10**400, 1e308,
    float("nan"), float("inf"), -float("inf"), "", "x", "0", "2", "../x", "/etc/passwd", "..\\x", "a\0b", "\ud800",
    "[/x]", "\x1b[31m", "globe", "fp8", "model.safetensors", "é" * 3000, [], {}, [[]], [None], [0], [-1], ["x"],
    {"a": 1},
    {"": None}, [0] * 20_000, [1] * 20_000, "A" * 100_000,
)  # fmt: skip
NASTY_BYTES = (
    b"", b"\0" * 64, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<!DOCTYPE html>", b"{}",
    b"[]", b"null", b"{", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 5000,
    b'{"a": ' + b"9" * 5000, b"PK\3\4", b"GGUF\3\0\0\0", struct.pack("<Q", 2**63), struct.pack("<Q", 2) + b"{}",
    b"\x80\4K\1.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """Files on disk, and the commands that read them, each with its weight."""

    folder: Path
    """What a case is a copy of."""
    mutated: str
    """The folder in it whose files are changed."""
    commands: tuple[tuple[int, tuple[str, ...]], ...]
    share: int
    """Of the cases, beside those of the other subjects."""
    unproved: bool = False
    """Leave the manifest out, so that files are read that it would refuse."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One mutation and what came of it."""

    number: int
    subject: str
    file: str
    mutation: str
    command: str
    outcome: str
    seconds: float
    nbytes: int
    told: str


def build_sources(folder: Path) -> Iterator[Subject]:
    """Sources in every layout and quantisation."""
    commands = ((12, INSPECT), (4, COMPRESS), (2, COMPRESS_CODED), (2, ("evaluate", SOURCE, *JUDGE)),
                (1, ("compress", SOURCE, "-o", "out", *FIT, *CALIBRATED)),
                (1, ("compress", SOURCE, "-o", "out", *CODE, *CALIBRATED)))  # fmt: skip
    for layout in ("per_expert", "fused"):
        place = _source(folder / f"{layout} source", functools.partial(write_source, layout=layout))
        yield Subject(place, SOURCE, commands, 4)
    for method in ("fp8", "mxfp4", "int4"):
        place = _source(folder / f"{method} source", functools.partial(write_quantised, method))
        yield Subject(place, SOURCE, ((12, INSPECT), (3, COMPRESS), (1, COMPRESS_CODED)), 4)


def build_outputs(folder: Path) -> Iterator[Subject]:
    """Compressed models, with the manifest that proves them and without it."""
    read = ((2, ("inspect", SMALL)), (2, ("report", SMALL)), (3, ("export", SMALL, "-o", "dense")), (1, LOAD),
            (1, ("evaluate", SMALL, *JUDGE, "--reference", "none")), (1, ("verify", SMALL)))  # fmt: skip
    wide = (*FIT, "--scope", "model", "--factor-dtype", "bfloat16")
    for name, settings in (("layers", FIT), ("model in bfloat16", wide), ("coded", CODE), ("packed", PACK)):
        place = _source(folder / name, write_source)
        assert _run(("compress", SOURCE, "-o", SMALL, *BARE, *settings)) == 0
        assert _run(("evaluate", SMALL, *JUDGE, "--reference", "none")) == 0
        shutil.rmtree(place / SOURCE)
        own = tuple(command for command in read if settings != PACK or command[1] != LOAD)  # which needs a package
        yield Subject(place, SMALL, own, 4, unproved=True)
        yield Subject(place, SMALL, own, 2)


def build_unfinished(folder: Path) -> Iterator[Subject]:
    """Runs that were interrupted."""
    runs = (("unfinished", 1, FIT), ("unfinished stream", 0, (*FIT, "--stream")), ("unfinished coded", 1, CODE))
    for name, finished, settings in runs:
        command = ("compress", SOURCE, "-o", "out", *CALIBRATED, *settings)
        place = _source(folder / name, write_source)
        _interrupted(command, finished)
        yield Subject(place, "out.partial", ((1, command),), 2)
    place = _source(folder / "unfinished sweep", write_source)
    _interrupted(SWEEP, 4)
    yield Subject(place, "grid", ((1, SWEEP),), 1)


BUILDERS = (build_sources, build_outputs, build_unfinished)


def _source(place: Path, write: Callable[[Path], object]) -> Path:
    """A source with a tokenizer, and a text beside it, in a folder that becomes the working directory."""
    text = "the quick brown fox jumps over the lazy dog. " * 40
    place.mkdir()
    (place / TEXT).write_text(text)
    write(place / SOURCE)
    _write_tokenizer(place / SOURCE, text)
    os.chdir(place)
    return place


def _write_tokenizer(folder: Path, text: str) -> None:
    """A token for each character."""
    letters = ["<unk>", *sorted(set(text))]
    tokenizer = Tokenizer(
        models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def _interrupted(command: Sequence[str], finished: int) -> None:
    """Run a command until so many of its scopes are finished."""
    fits, families = iter(range(finished)), iter(range(len(FAMILIES) * finished))

    def count(original: Callable[..., Any], calls: Iterator[int] = fits) -> Callable[..., Any]:
        def fit(*given: Any, **named: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(*given, **named)

        return fit

    with (
        mock.patch.object(scope, "fit_bank", count(scope.fit_bank)),
        mock.patch.object(scope, "code_family", count(scope.code_family, families)),
        mock.patch.object(compensation, "code_family", count(compensation.code_family, families)),
        mock.patch.object(StreamedExperts, "store", count(StreamedExperts.store)),
    ):
        assert _run(command) == 130


def mutate(path: Path, rng: random.Random) -> str:
    """Change a file; says how."""
    if rng.random() < 0.04:
        return _replace(path, rng)
    raw = path.read_bytes()
    if path.name.endswith(".json") and rng.random() < 0.75:
        with contextlib.suppress(ValueError, RecursionError):
            text, how = _mutate_json(json.loads(raw), rng)
            path.write_bytes(text)
            return how
    if path.name.endswith(".safetensors") and len(raw) > 8:
        (length,) = struct.unpack("<Q", raw[:8])
        header, data = raw[8 : 8 + length], raw[8 + length :]
        if rng.random() < 0.7:
            with contextlib.suppress(ValueError, RecursionError):
                text, how = _mutate_json(json.loads(header), rng)
                path.write_bytes(struct.pack("<Q", len(text)) + text + data)
                return f"header, {how}"
        if rng.random() < 0.7:
            header, how = _mutate_bytes(raw[: 8 + length], rng)
            path.write_bytes(header + data)
            return f"header, {how}"
    changed, how = _mutate_bytes(raw, rng)
    path.write_bytes(changed)
    return how


def _replace(path: Path, rng: random.Random) -> str:
    """Put something else in the place of a file."""
    path.unlink()
    kind = rng.choice(("nothing", "pipe", "folder", "dangling link", "device", "link outside", "bytes", "bytes"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link outside":
        path.symlink_to("/etc/hostname")
    elif kind == "bytes":
        path.write_bytes(rng.choice(NASTY_BYTES))
    return f"replaced by {kind}"


def _mutate_bytes(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    changed, kind = bytearray(raw), rng.choice(("flip", "overwrite", "cut", "insert", "remove", "double", "zero"))
    place = rng.randrange(len(raw) + 1)
    end = min(len(raw), place + rng.choice((1, 2, 8, 64)))
    if kind == "flip" and end > place:
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        changed[place:end] = rng.randbytes(end - place)
    elif kind == "cut":
        del changed[place:]
    elif kind == "insert":
        changed[place:place] = rng.choice((*NASTY_BYTES, b"\xff", b"\0", b'"', b"}", b",", b"-", b"9" * 20))
    elif kind == "remove":
        del changed[place:end]
    elif kind == "double":
        changed[place:place] = raw[place:end]
    else:
        changed[place:end] = bytes(end - place)
    return bytes(changed), f"{kind} at byte {place}"


def _mutate_json(content: Any, rng: random.Random) -> tuple[bytes, str]:
    """Change values and keys of a JSON text, once or a few times; returns the text and how."""
    content, told = copy.deepcopy(content), list[str]()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(content, rng))
        if not places:
            break
        parent, key = rng.choice(places)
        told.append(f"{_mutate_place(parent, key, [holder[name] for holder, name in places], rng)} {str(key)[:60]!r}")
    text = json.dumps(content)
    if isinstance(content, dict) and content and rng.random() < 0.05:  # a key twice
        name = rng.choice(list(content))
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(rng.choice(NASTY))}}}"
        told.append(f"twice {name[:60]!r}")
    return text.encode(), "; ".join(told)


def _mutate_place(parent: Any, key: Any, values: Sequence[Any], rng: random.Random) -> str:
    kind = rng.choice(("nasty", "nasty", "nasty", "near", "near", "drop", "rename", "another", "wrap", "add"))
    value = parent[key]
    if kind == "near" and isinstance(value, int | float) and not isinstance(value, bool):
        rounded = float(max(-1e300, min(1e300, value)))  # an integer can be beyond the floats
        near = (value + 1, value - 1, -value, value * 2, rounded, str(value), value * 1000)
        with contextlib.suppress(OverflowError):
            parent[key] = rng.choice(near)
    elif kind == "near" and isinstance(value, str) and value:
        place = rng.randrange(len(value))
        parent[key] = value[:place] + rng.choice(("", "x", "/", "\0", "..", "0", "é")) + value[place + 1 :]
    elif kind == "near" and isinstance(value, list):
        parent[key] = rng.choice(
            (value[1:], value[:-1], value[::-1], value * 2, value * 1000 if len(value) < 9 else [])
        )
    elif kind == "drop":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[rng.choice((f"{key}x", f"_{key}", "", "self", "a\0b", "\ud800", "K" * 5000))] = parent.pop(key)
    elif kind == "another":
        parent[key] = copy.deepcopy(rng.choice(values))
    elif kind == "wrap":
        for _ in range(rng.choice((1, 2, 40, 400))):
            value = rng.choice(([value], {"a": value}))
        parent[key] = value
    elif kind == "add" and isinstance(parent, dict):
        parent[rng.choice(("extra", "self", "quantization_config", "text_config", "dtype", "shape"))] = rng.choice(
            NASTY
        )
    else:
        parent[key] = copy.deepcopy(rng.choice(NASTY))
    return kind


def _places(content: Any, rng: random.Random) -> Iterator[tuple[Any, Any]]:
    """Holder and key of every value; of long lists and objects some."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys if len(keys) < 60 else rng.sample(list(keys), 60):
        yield content, key
        yield from _places(content[key], rng)


def run_case(subjects: Sequence[Subject], number: int, seed: int, place: Path, baseline: int = 0) -> Case:
    """Mutate a copy of a subject in `place` and run one of its commands there, in a fork."""
    rng = random.Random(f"{seed}/{number}")
    subject = rng.choices(subjects, [subject.share for subject in subjects])[0]
    work = place / "case"
    shutil.copytree(subject.folder, work, symlinks=True)
    manifest = work / subject.mutated / "globe_manifest.json"
    if subject.unproved:
        manifest.unlink()
    command = rng.choices([command for _, command in subject.commands], [weight for weight, _ in subject.commands])[0]
    endings = (".safetensors",) if command[0] == "load" else ("",)  # transformers itself reads the others
    files = sorted(path for path in (work / subject.mutated).rglob("*") if path.is_file() and path.name != "lock")
    files = [path for path in files if path.name.endswith(endings)]
    path = rng.choices(files, [_weight(path, command) for path in files])[0]
    name, how = path.relative_to(work).as_posix(), mutate(path, rng)
    status, cpu, resident, output = forked(lambda: _run(command), work, place / "told")
    outcome = {0: "success", 1: "refused", 2: "refused"}.get(
        status, "traceback" if status == 70 else f"killed ({status})"
    )
    if cpu > MOST_SECONDS or status == -signal.SIGALRM:
        outcome = "hang"
    elif resident - baseline > MOST_BYTES:
        outcome = "memory"
    if outcome not in ("success", "refused"):
        for trace in work.glob("globe-traceback-*"):
            output += trace.read_text(errors="replace")
    shutil.rmtree(work)
    label = f"{subject.folder.name}{' unproved' if subject.unproved else ''}"
    return Case(number, label, name, how, " ".join(command), outcome, cpu, resident - baseline, output)


def _weight(path: Path, command: Sequence[str]) -> float:
    if path.name.startswith("tokenizer") or path.name.endswith((".md", ".txt")):
        return 1.0 if command[0] == "evaluate" else 0.05
    return 0.2 if path.name in ("generation_config.json", "globe_autoload.py", "modeling.py") else 1.0


_parse = functools.cache(cli._parse)


def _run(command: Sequence[str]) -> int:
    if command[0] != "load":
        with mock.patch.object(cli, "_parse", return_value=_parse(tuple(command))):  # half of the time, otherwise
            return cli.main(list(command))
    try:
        AutoModelForCausalLM.from_pretrained(command[1])
    except (OSError, ValueError, SafetensorError) as error:  # GloBE's own are among them; the others are transformers'
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # what transformers says of a dense tensor's shape
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def forked(work: Callable[[], int], folder: Path, told: Path) -> tuple[int, float, int, str]:
    """Run `work` in a fork, in `folder`: exit status, seconds of processor time, largest resident bytes, stderr."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _become(work, folder, told)
    _, status, usage = os.wait4(child, 0)
    return (
        os.waitstatus_to_exitcode(status),
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024,
        told.read_text(errors="replace"),
    )


def _become(work: Callable[[], int], folder: Path, told: Path) -> None:
    """The child: never returns."""
    status = 70
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, DEADLINE)
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", errors="backslashreplace")
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        os.chdir(folder)
        tempfile.tempdir = str(folder)
        status = work()
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def fuzz(
    folder: Path,
    numbers: Iterable[int],
    seed: int,
    show: Callable[[Case], None],
    builders: Iterable[Callable[[Path], Iterator[Subject]]] = BUILDERS,
) -> None:
    """Run the cases of these numbers, and show each; `folder` is where everything is written."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # others would not be there in a fork
    for width in range(trellis.LEAST_WIDTH, trellis.MAX_WIDTH + 1):  # compiled here, not in every fork
        trellis.encode(torch.randn(2, trellis.LOG_STATES), width)
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        subjects = [subject for builder in builders for subject in builder(folder)]
        # each command runs to its end, and what is imported late is imported here
        for place, command in {(subject.folder, command) for subject in subjects for _, command in subject.commands}:
            shutil.copytree(place, folder / "whole")
            os.chdir(folder / "whole")
            assert _run(command) == 0, f"{place.name}: {' '.join(command)} fails unmutated"
            os.chdir(folder)
            shutil.rmtree(folder / "whole")
    gc.freeze()  # or every fork copies what its collector touches
    baseline = forked(lambda: 0, folder, folder / "told")[2]
    for number in numbers:
        show(run_case(subjects, number, seed, folder, baseline))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="go on from this number")
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    counts, faults = collections.Counter[str](), dict[str, list[Case]]()
    began, slowest, largest = time.monotonic(), 0.0, 0

    def show(case: Case) -> None:
        nonlocal slowest, largest
        counts[case.outcome] += 1
        slowest, largest = max(slowest, case.seconds), max(largest, case.nbytes)
        if options.only is not None:
            print(case.told)
        if case.outcome not in ("success", "refused") or options.only is not None:
            lines = [line for line in case.told.splitlines() if line.strip()] or [""]
            first = next((line for line in lines if line.startswith("bug: ")), lines[-1])
            key = f"{case.outcome}: {first[:160]}"
            if key not in faults or options.only is not None:
                print(f"{key}\n    {case.number}: {case.subject}, {case.command}: {case.file}: {case.mutation[:300]}")
            faults.setdefault(key, []).append(case)
        if sum(counts.values()) % 1000 == 0:
            print(f"{sum(counts.values())} mutations in {time.monotonic() - began:.0f} s: {dict(counts)}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        numbers = range(options.start, options.mutations) if options.only is None else [options.only]
        fuzz(Path(folder), numbers, options.seed, show)
        os.chdir("/")
    for key, cases in sorted(faults.items(), key=lambda entry: -len(entry[1])):
        print(f"{len(cases):5d} {key}  [{', '.join(str(case.number) for case in cases[:4])}]")
    print(
        f"{sum(counts.values())} mutations, seed {options.seed}: {dict(counts)}; slowest {slowest:.2f} s of processor "
        f"time, largest {largest / 1e6:.0f} MB beyond the start; {time.monotonic() - began:.0f} s in all"
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
