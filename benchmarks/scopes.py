"""What sharing is worth: error, quality, compose cost and time by who shares a bank, at equal stored parameters.

python -m benchmarks.scopes
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers.utils import logging

from benchmarks.quality import Evaluator
from benchmarks.record import RESULTS, write_record
from benchmarks.tables import Column, print_table
from globe import CompressConfig, compress
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.model.configuration import expert_layers

COLUMNS = (
    Column("keep", "keep", "g"),
    Column("scope", "scope"),
    Column("share_families", "families share"),
    Column("stream", "streamed"),
    Column("matrices", "E", "d"),
    Column("rank", "R", "d"),
    Column("num_bases", "M", "d"),
    Column("stored", "stored", ".3f"),
    Column("error", "error", ".4f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("kl", "KL", ".5f"),
    Column("compose", "M R / P", ".0f"),
    Column("seconds", "seconds", ".0f"),
)


@dataclasses.dataclass(frozen=True)
class ScopesConfig:
    """What is compressed."""

    model: str = "shipped"
    """`shipped`, a local directory or a Hub id."""
    keeps: tuple[float, ...] = (0.75, 0.5)
    """Budgets."""
    scopes: tuple[str, ...] = ("layer", "2", "7", "model")
    """Layers that share a bank."""
    steps: int = 500
    """Steps of each fit."""
    max_tokens: int = 32768
    """Held-out tokens predicted."""
    seed: int = 0
    """Seeds the warm starts."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "scopes.json"
    """Where the record is written."""


def main(config: ScopesConfig) -> None:
    torch.set_num_threads(config.threads)
    logging.disable_progress_bar()
    model = resolve_model(config.model)
    evaluator = Evaluator(model, config.max_tokens)
    num_rows = expert_layers(open_checkpoint(model))[0].intermediate_size
    rows: list[dict[str, Any]] = []
    for keep in config.keeps:
        cases = [("layer", False, False), *((scope, True, False) for scope in config.scopes), ("model", True, True)]
        for scope, shared, stream in cases:
            settings = CompressConfig(
                keep=keep, scope=scope, share_families=shared, stream=stream, steps=config.steps, seed=config.seed
            )
            with tempfile.TemporaryDirectory() as folder:
                report = compress(model, Path(folder) / "compressed", settings)
                quality = evaluator.directory(Path(folder) / "compressed")
            bank = report.banks[0].shape
            rows.append(
                {
                    "keep": keep,
                    "scope": scope,
                    "share_families": "yes" if shared else "no",
                    "stream": "yes" if stream else "no",
                    "matrices": bank.num_matrices,
                    "rank": bank.rank,
                    "num_bases": bank.num_bases,
                    "stored": report.kept,
                    "error": report.error,
                    **quality,
                    # multiply-adds that mixing the bases takes, per element of an expert
                    "compose": bank.num_bases * bank.rank / num_rows,
                    "seconds": report.seconds,
                }
            )
            print(
                {key: rows[-1][key] for key in ("keep", "scope", "stream", "error", "perplexity", "kl", "seconds")},
                flush=True,
            )
    print_table(f"Who shares a bank, {config.steps} steps, {config.threads} threads", rows, COLUMNS)
    write_record(config.output, "scopes", config, rows, [])


if __name__ == "__main__":
    main(tyro.cli(ScopesConfig, description=__doc__))
