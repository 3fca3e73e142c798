"""What allocating the budget by sensitivity is worth: uniform against allocated at equal stored parameters.

python -m benchmarks.allocation
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from transformers.utils import logging

from benchmarks.quality import Evaluator
from benchmarks.record import RESULTS, write_record
from benchmarks.tables import Column, print_table
from globe import CompressConfig, compress
from globe.checkpoint.shipped import resolve_model

COLUMNS = (
    Column("keep", "keep", "g"),
    Column("allocation", "allocation"),
    Column("stored", "stored", ".4f"),
    Column("least", "least", ".3f"),
    Column("most", "most", ".3f"),
    Column("error", "error", ".4f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("kl", "KL", ".5f"),
    Column("seconds", "seconds", ".1f"),
)
ALLOCATIONS: tuple[Literal["uniform", "sensitivity"], ...] = ("uniform", "sensitivity")


@dataclasses.dataclass(frozen=True)
class AllocationConfig:
    """What is compared."""

    model: str = "shipped"
    """`shipped`, a local directory or a Hub id."""
    keeps: tuple[float, ...] = (0.75, 0.625, 0.5, 0.35)
    """Budgets."""
    steps: int = 500
    """Steps of each fit."""
    max_tokens: int = 32768
    """Held-out tokens predicted."""
    seed: int = 0
    """Seeds the warm starts and the random tokens."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "allocation.json"
    """Where the record is written."""


def main(config: AllocationConfig) -> None:
    torch.set_num_threads(config.threads)
    logging.disable_progress_bar()
    model = resolve_model(config.model)
    evaluator = Evaluator(model, config.max_tokens)
    rows: list[dict[str, Any]] = []
    for keep in config.keeps:
        for allocation in ALLOCATIONS:
            settings = CompressConfig(keep=keep, allocation=allocation, steps=config.steps, seed=config.seed)
            with tempfile.TemporaryDirectory() as folder:
                report = compress(model, Path(folder) / "compressed", settings)
                quality = evaluator.directory(Path(folder) / "compressed")
            shares = [bank.shape.share for bank in report.banks]
            rows.append(
                {
                    "keep": keep,
                    "allocation": allocation,
                    "stored": report.kept,
                    "least": min(shares),
                    "most": max(shares),
                    "shares": shares,
                    "error": report.error,
                    **quality,
                    "seconds": report.seconds,
                }
            )
            print({key: rows[-1][key] for key in ("keep", "allocation", "error", "perplexity", "kl")}, flush=True)
    print_table(f"Who gets the budget, {config.steps} steps, {config.threads} threads", rows, COLUMNS)
    write_record(config.output, "allocation", config, rows, [])


if __name__ == "__main__":
    main(tyro.cli(AllocationConfig, description=__doc__))
