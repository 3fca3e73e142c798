"""What calibration is worth: quality on held-out text of fits with and without it, at equal stored parameters.

python -m benchmarks.calibrated
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers.utils import logging

from benchmarks.calibration import CALIBRATION
from benchmarks.quality import Evaluator
from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.tables import Column, print_claims, print_table
from globe import CompressConfig, compress
from globe.checkpoint.shipped import resolve_model

COLUMNS = (
    Column("keep", "keep", "g"),
    Column("text", "calibrated on"),
    Column("stored", "stored", ".3f"),
    Column("error", "error", ".4f"),
    Column("gate", "gate", ".4f"),
    Column("up", "up", ".4f"),
    Column("down", "down", ".4f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("kl", "KL", ".5f"),
)
TEXTS = {"none": "none", "samples": "samples", "calibration": CALIBRATION}
CLAIMED = 0.85
"""KL of a calibrated fit over that of a fit to the weights alone, at most, at keep 0.5."""


@dataclasses.dataclass(frozen=True)
class CalibratedConfig:
    """What is compressed."""

    model: str = "shipped"
    """`shipped`, a local directory or a Hub id."""
    keeps: tuple[float, ...] = (0.75, 0.5, 0.35)
    """Budgets."""
    steps: int = 500
    """Steps of each fit."""
    calibration_tokens: int = 65536
    """Tokens of the calibration split that are seen."""
    max_tokens: int = 32768
    """Held-out tokens predicted."""
    seed: int = 0
    """Seeds the warm starts."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "calibrated.json"
    """Where the record is written."""


def judge_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """The divergence of the calibrated fits against that of the fit to the weights alone at each budget."""
    kl = {(row["keep"], row["text"]): row["kl"] for row in rows}
    claims: list[Claim] = []
    for keep, text in kl:
        if text != "none":
            ratio = kl[keep, text] / kl[keep, "none"]
            most = CLAIMED if keep == 0.5 else 1.0
            statement = f"keep {keep:g}, calibrated on {text}: KL is at most {most:g} of that of the weights alone"
            claims.append(Claim(statement, f"{ratio:.3f}", ratio <= most))
    return claims


def main(config: CalibratedConfig) -> None:
    torch.set_num_threads(config.threads)
    logging.disable_progress_bar()
    model = resolve_model(config.model)
    evaluator = Evaluator(model, config.max_tokens)
    rows: list[dict[str, Any]] = []
    for keep in config.keeps:
        for text, source in TEXTS.items():
            settings = CompressConfig(
                keep=keep,
                steps=config.steps,
                seed=config.seed,
                calibrate=source,
                calibration_tokens=config.calibration_tokens,
            )
            with tempfile.TemporaryDirectory() as folder:
                report = compress(model, Path(folder) / "compressed", settings)
                quality = evaluator.directory(Path(folder) / "compressed")
            fitted = {"stored": report.kept, "error": report.error, **report.family_errors()}
            rows.append({"keep": keep, "text": text, **fitted, **quality})
            print(rows[-1], flush=True)
    claims = judge_claims(rows)
    print_table(f"Calibration, {config.steps} steps, {config.max_tokens} held-out tokens", rows, COLUMNS)
    print_claims(claims)
    write_record(config.output, "calibrated", config, rows, claims)


if __name__ == "__main__":
    main(tyro.cli(CalibratedConfig, description=__doc__))
