"""One compression by one, two, … processes of a thread each: how much faster, and whether the bytes are the same.

    python -m benchmarks.ranks

The model has many layers and random weights; it is not run, which one process would do for all. `wall` is what a user
waits for, start included. `busiest` is the processor time of the process that took most of it, and hardly depends on
what else the machine does; where that leaves fewer processors free than there are processes, the first says little.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.tables import Column, print_claims, print_table
from globe.checkpoint.manifest import read_manifest

COLUMNS = (
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
    for processes in config.processes:
        row = _compress(source, config.folder / f"by-{processes}", processes, config.arguments)
        rows.append(row)
        row |= {"faster": rows[0]["wall"] / row["wall"], "faster_busiest": rows[0]["busiest"] / row["busiest"]}
    weights = [_weights(config.folder / f"by-{processes}") for processes in config.processes]
    two = next(row for row in rows if row["processes"] == 2)
    claims = [
        Claim(
            "every number of processes makes the same bytes",
            f"{len(weights[0])} files",
            weights == weights[:1] * len(weights),
        ),
        Claim("two are at least 1.8 times as fast as one", f"{two['faster']:.2f}", two["faster"] >= 1.8),
        Claim("and each does half of the work", f"{two['faster_busiest']:.2f}", two["faster_busiest"] >= 1.8),
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
        vocab_size=1024,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model).save_pretrained(folder)


def _compress(source: Path, output: Path, processes: int, arguments: tuple[str, ...]) -> dict[str, Any]:
    """What a compression took."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    load, began = os.getloadavg()[0], time.monotonic()
    process = psutil.Popen(
        [sys.executable, *launch, "-m", "globe", "compress", str(source), "-o", str(output), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    taken = dict[int, float]()
    while process.poll() is None:
        time.sleep(0.2)
        try:
            for each in (process, *process.children(recursive=True)):
                taken[each.pid] = sum(each.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    assert process.returncode == 0
    wall = time.monotonic() - began
    return {"processes": processes, "wall": wall, "busiest": max(taken.values()), "load": load}


def _weights(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files with tensors."""
    manifest = read_manifest(folder)
    assert manifest is not None
    return {name: sha256 for name, sha256 in manifest.files.items() if name.endswith(".safetensors")}


if __name__ == "__main__":
    main(tyro.cli(RanksConfig, description=__doc__))
