"""A model that does not fit into the memory that it may take, compressed, evaluated and exported.

    python -m benchmarks.large

The model has the layers of Qwen3-30B-A3B, few of them and by default few experts in each, and random weights with a
planted spectrum (`scripts/make_large_model.py`). Every command runs in a process of its own, is told that the machine
has so much memory, and its largest resident memory is held against that. Nothing enforces the bound here, since limits
of a process (RLIMIT_AS, RLIMIT_DATA) count files that are mapped and never read; a control group does:

    systemd-run --scope --property MemoryMax=6G python -m benchmarks.large \\
        --experts 128 --vocabulary 151936 --memory 6 --threads 2

The compression is killed (SIGKILL) once in each of its phases, and goes on with what is finished. `env`, which shows
versions, has what Python, torch and GloBE's own code take.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.tables import Column, print_claims, print_table
from globe.checkpoint.evaluation import of_original, read_evaluations
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import Report
from scripts.make_large_model import LargeModel, make_large_model

COLUMNS = (
    Column("command", "command"),
    Column("seconds", "s", ".0f"),
    Column("peak", "peak, GB", ".2f"),
    Column("of_model", "of the model", ".2f"),
)
TOLD = """
import sys
from globe.cli.main import main
from globe.measure import runnable
runnable.total_memory = lambda device: (int(sys.argv[1]), "this benchmark allows no more")
sys.exit(main(sys.argv[2:]))
"""
"""What a process runs: a command of GloBE that is told how much memory there is."""
PHASES = ("running the model to calibrate", "measuring what errors cost", "planning", " left")
"""What compress says at the beginning of each of its phases, and when a layer is coded."""
TOLERANCE = 0.2
"""How far the time that is said to be left may be from what it then takes."""


@dataclasses.dataclass(frozen=True)
class LargeConfig:
    """How large the model and the memory are."""

    layers: int = 12
    """Decoder layers."""
    experts: int = 16
    """Experts of each."""
    vocabulary: int = 8192
    """Tokens."""
    memory: float = 2.2
    """GB that the processes are told of."""
    bits: float = 3
    """Stored bits per weight of the experts."""
    calibration_tokens: int = 2048
    """Tokens on which the model is run to calibrate; by default GloBE would take 16,384."""
    evaluation_tokens: int = 512
    """Tokens on which original and compressed model are compared."""
    threads: int = 1
    """CPU threads."""
    folder: Path = Path("runs/large")
    """Where the models are written."""
    output: Path = RESULTS / "large.json"
    """Where the record is written."""


def main(config: LargeConfig) -> None:
    """Run everything, print the table, write the record."""
    source = config.folder / f"{config.layers}x{config.experts}x{config.vocabulary}"
    make_large_model(LargeModel(source, config.layers, config.experts, config.vocabulary))
    size = sum(tensor.nbytes for tensor in open_checkpoint(source).tensors.values())
    small, dense = config.folder / "small", config.folder / "dense"
    for path in (small, small.with_name("small.partial"), dense, dense.with_name("dense.partial")):
        shutil.rmtree(path, ignore_errors=True)
    compress = ["compress", str(source), "-o", str(small), "--bits", f"{config.bits:g}"]
    compress += ["--calibration-tokens", f"{config.calibration_tokens}"]
    evaluate = ["evaluate", str(small), "--reference", str(source), "--batch", "1"]
    evaluate += ["--max-tokens", f"{config.evaluation_tokens}"]
    killed = [(f"compress, killed in phase {number}", phase) for number, phase in enumerate(PHASES, 1)]
    run = functools.partial(_run, memory=config.memory, size=size, threads=config.threads)
    rows = [
        run("env", ["env"]),
        *(run(name, compress, stop_at=phase) for name, phase in killed),
        run("compress, resumed", compress),
        run("evaluate", evaluate),
        run("export", ["export", str(small), "-o", str(dense)]),
    ]
    report = Report.read(small)
    evaluation = of_original(read_evaluations(small))
    assert evaluation is not None
    assert evaluation.kl is not None
    assert report.calibration is not None
    ratios = rows[-3].pop("left_over_taken")[1:-1]
    claims = [
        Claim(
            "no command takes more than it may",
            f"at most {max(row['peak'] for row in rows):.2f} GB of {config.memory:g} GB",
            all(row["peak"] < config.memory for row in rows),
        ),
        Claim(
            "beside the code, no command takes as much as the model",
            f"at most {max(row['peak'] for row in rows) - rows[0]['peak']:.2f} GB; the model {size / 1e9:.2f} GB",
            all(row["peak"] - rows[0]["peak"] < size / 1e9 for row in rows),
        ),
        Claim(
            "it is measured nevertheless, a layer at a time",
            f"on {report.calibration.num_tokens} tokens of {report.calibration.text}",
            report.calibration.streamed_because is not None and report.uniform_because is None,
        ),
        Claim(
            "every command ends, the killed one resumed",
            ", ".join(f"{row['command']} {row['status']}" for row in rows),
            [row["status"] for row in rows] == [0, *[-signal.SIGKILL] * len(PHASES), 0, 0, 0],
        ),
        Claim(
            f"the time that is left is known to {TOLERANCE:.0%} from the second layer on",
            f"said over taken {', '.join(f'{ratio:.2f}' for ratio in ratios)}",
            all(abs(ratio - 1) <= TOLERANCE for ratio in ratios),
        ),
        Claim("the compressed model is near the original", f"KL {evaluation.kl:.4f}", evaluation.kl < 1),
    ]
    print_table(f"{size / 1e9:.2f} GB of weights, told of {config.memory:g} GB of memory", rows, COLUMNS)
    print_claims(claims)
    write_record(config.output, "large", config, rows, claims)


def _run(
    name: str, arguments: list[str], memory: float, size: int, threads: int, stop_at: str | None = None
) -> dict[str, Any]:
    """Run a command of GloBE in a process that is told of so many GB, and kill it when it says something."""
    began, said = time.monotonic(), list[tuple[float, float]]()
    process = subprocess.Popen(
        [sys.executable, "-c", TOLD, str(int(1e9 * memory)), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "COLUMNS": "200"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := re.search(r"([0-9:]+) left$", line):
            left = sum(60**place * int(part) for place, part in enumerate(reversed(match[1].split(":"))))
            said.append((left, time.monotonic()))
        if stop_at is not None and stop_at in line:
            time.sleep(1)
            process.kill()
    ended = time.monotonic()
    _, status, usage = os.wait4(process.pid, 0)
    peak = 1024 * usage.ru_maxrss
    return {
        "command": name,
        "status": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - began,
        "peak": peak / 1e9,
        "of_model": peak / size,
        **({"left_over_taken": [left / (ended - when) for left, when in said]} if stop_at is None and said else {}),
    }


if __name__ == "__main__":
    main(tyro.cli(LargeConfig))
