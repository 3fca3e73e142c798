"""One compression by one, two, … processes of a thread each: how much faster, and whether the bytes are the same.

    python -m benchmarks.ranks

The model has many layers and random weights. It is compressed from its weights alone, and then measured a layer at a
time, by processes that are told of a memory that does not hold it. `wall` is what a user waits for, to compress with
the start included. `busiest` is the processor time of the process that took most of it, and hardly depends on what else
the machine does; where that leaves fewer processors free than there are processes, the first says little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.large import TOLD
from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.tables import Column, print_claims, print_table
from globe.checkpoint.digest import file_sha256
from globe.checkpoint.manifest import read_manifest
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model

COLUMNS = (
    Column("work", "work"),
    Column("processes", "processes", "d"),
    Column("wall", "wall, s", ".0f"),
    Column("busiest", "busiest, s", ".0f"),
    Column("load", "load before", ".1f"),
    Column("faster", "times as fast", ".2f"),
    Column("faster_busiest", "by the busiest", ".2f"),
)


@dataclasses.dataclass(frozen=True)
class RanksConfig:
    """What is compressed, and by how many."""

    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes, 1 first."""
    layers: int = 16
    """Decoder layers."""
    experts: int = 16
    """Experts of each, of 128 x 512 and three matrices."""
    arguments: tuple[str, ...] = ("--bits", "3", "--calibrate", "none", "--allocation", "uniform")
    """Of `globe compress`."""
    calibration_tokens: int = 16384
    """On which the model is measured."""
    folder: Path = Path("runs/ranks")
    """Where the models are written."""
    output: Path = RESULTS / "ranks.json"
    """Where the record is written."""


def main(config: RanksConfig) -> None:
    """Run everything, print the table, write the record."""
    shutil.rmtree(config.folder, ignore_errors=True)
    source = config.folder / "source"
    _write_source(source, config)
    _compress(source, config.folder / "compiled", 1, (*config.arguments, "--layers", "0"))
    rows: list[dict[str, Any]] = []
    for work in ("compress", "measure"):
        of_one: dict[str, Any] = {}
        for processes in config.processes:
            output = config.folder / f"{work}-by-{processes}"
            if work == "compress":
                row = _compress(source, output, processes, config.arguments)
            else:
                row = _measure(source, output, processes, config)
            of_one = of_one or row
            faster = {"faster": of_one["wall"] / row["wall"], "faster_busiest": of_one["busiest"] / row["busiest"]}
            rows.append({"work": work, **row, **faster})
    weights = [_weights(config.folder / f"compress-by-{processes}") for processes in config.processes]
    statistics = [file_sha256(_statistics(config.folder / f"measure-by-{each}")) for each in config.processes]
    compressed, measured = (row for row in rows if row["processes"] == 2)
    claims = [
        Claim(
            "every number of processes makes the same bytes",
            f"{len(weights[0])} files, and the statistics",
            weights == weights[:1] * len(weights) and len({*statistics}) == 1,
        ),
        Claim("two are at least 1.8 times as fast as one", f"{compressed['faster']:.2f}", compressed["faster"] >= 1.8),
        Claim(
            "and each does half of the work",
            f"{compressed['faster_busiest']:.2f}",
            compressed["faster_busiest"] >= 1.8,
        ),
        Claim("two measure at least 1.8 times as fast", f"{measured['faster']:.2f}", measured["faster"] >= 1.8),
        Claim("and each does half of that", f"{measured['faster_busiest']:.2f}", measured["faster_busiest"] >= 1.8),
    ]
    print_table(f"{config.layers} layers of {config.experts} experts, a thread each", rows, COLUMNS)
    print_claims(claims)
    write_record(config.output, "ranks", config, rows, claims)


def _write_source(folder: Path, config: RanksConfig) -> None:
    model = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=512,
        moe_intermediate_size=128,
        num_experts=config.experts,
        num_experts_per_tok=2,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2048,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(resolve_model("shipped")) / name, folder)


def _compress(source: Path, output: Path, processes: int, arguments: tuple[str, ...]) -> dict[str, Any]:
    """What a compression took."""
    load, began = os.getloadavg()[0], time.monotonic()
    process = _start(processes, ("-m", "globe"), "compress", str(source), "-o", str(output), *arguments)
    taken = dict[int, float]()
    while process.poll() is None:
        time.sleep(0.2)
        taken |= _processor_times(process)
    assert process.returncode == 0
    wall = time.monotonic() - began
    return {"processes": processes, "wall": wall, "busiest": max(taken.values()), "load": load}


def _measure(source: Path, output: Path, processes: int, config: RanksConfig) -> dict[str, Any]:
    """What measuring took, of a compression that is ended when its statistics are kept."""
    load, size = os.getloadavg()[0], sum(tensor.nbytes for tensor in open_checkpoint(source).tensors.values())
    process = _start(
        processes,
        ("-c", TOLD, f"{int(1.9 * size)}"),
        *("compress", str(source), "-o", str(output), "--bits", "3", "--calibrate"),
        *("--calibration-tokens", f"{config.calibration_tokens}", "--save-statistics", str(_statistics(output))),
    )
    assert process.stdout is not None
    began, taken, row = 0.0, dict[int, float](), dict[str, Any]()
    for line in process.stdout:
        if line.startswith("running the model to calibrate, a layer at a time"):
            began, taken = time.monotonic(), _processor_times(process)
        if line.startswith("planning"):
            busiest = max(seconds - taken.get(each, 0.0) for each, seconds in _processor_times(process).items())
            row = {"processes": processes, "wall": time.monotonic() - began, "busiest": busiest, "load": load}
            process.terminate()
    process.wait()
    return row


def _start(processes: int, program: tuple[str, ...], *arguments: str) -> psutil.Popen:
    """A command of GloBE in so many processes of a thread each. What it prints can be read."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python"]
    return psutil.Popen(
        [sys.executable, *([*launch, sys.executable] if processes > 1 else []), *program, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _processor_times(process: psutil.Popen) -> dict[int, float]:
    """Seconds that a process and its children have taken, by their numbers."""
    found = dict[int, float]()
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[each.pid] = sum(each.cpu_times()[:2])
    return found


def _statistics(output: Path) -> Path:
    return output.with_name(f"{output.name}.safetensors")


def _weights(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files with tensors."""
    manifest = read_manifest(folder)
    assert manifest is not None
    return {name: sha256 for name, sha256 in manifest.files.items() if name.endswith(".safetensors")}


if __name__ == "__main__":
    main(tyro.cli(RanksConfig, description=__doc__))
