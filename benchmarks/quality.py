"""Error, perplexity and divergence of GloBE, truncated SVD and MoBE at equal stored parameters.

    python -m benchmarks.quality

Every method gets the same weights and a budget of stored parameters, and what it stores is rounded to the precision of
the checkpoint. GloBE goes the whole way: compressed to a directory and loaded from it. All models are evaluated in
float32 on the same held-out tokens, against the original.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.rivals.mobe import best_shape, mobe, published_shape
from benchmarks.rivals.truncated_svd import truncated_svd
from benchmarks.stacks import Approximation, Stacks, family_errors, read_stacks, write_stacks
from benchmarks.tables import Column, print_claims, print_table
from globe import CompressConfig, EvaluateConfig, compress
from globe.evaluate import evaluate_model, token_windows
from globe.shipped import read_text, resolve_model

PERPLEXITY_RISE = 0.02
"""Largest rise of GloBE's perplexity at keep 0.75 that is claimed."""
CLAIMED_KEEP = 0.75
COLUMNS = (
    Column("keep", "keep", "g"),
    Column("method", "method"),
    Column("shape", "shape"),
    Column("stored", "stored", ".3f"),
    Column("error", "error", ".4f"),
    Column("gate", "gate", ".4f"),
    Column("up", "up", ".4f"),
    Column("down", "down", ".4f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("perplexity_rise", "rise", "+.2%"),
    Column("kl", "KL", ".5f"),
    Column("seconds", "seconds", ".1f"),
    Column("seconds_over_globe", "x GloBE", ".2f"),
)


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """What is compared."""

    model: str = "shipped"
    """`shipped`, a local directory or a Hub id."""
    keeps: tuple[float, ...] = (0.75, 0.5, 0.35)
    """Budgets: stored parameters of the experts over the original ones."""
    mobe_epochs: int = 2000
    """Adam steps of MoBE."""
    steps: int = 500
    """Steps of GloBE."""
    seed: int = 0
    """Seeds what is random."""
    threads: int = 1
    """CPU threads of all methods."""
    max_tokens: int = 32768
    """Held-out tokens predicted."""
    layers: tuple[int, ...] | None = None
    """Layers to compress; None: all."""
    output: Path = RESULTS / "quality.json"
    """Where the record is written."""


class Evaluator:
    """Models judged on the same tokens against the same original, in float32."""

    def __init__(self, model: str | Path, max_tokens: int) -> None:
        self._original = _load(model)
        tokenizer = AutoTokenizer.from_pretrained(str(model))
        self._windows, self._bytes_per_token = token_windows(
            tokenizer, read_text("heldout"), EvaluateConfig(max_tokens=max_tokens)
        )

    def original(self) -> dict[str, float]:
        """Perplexity of the original."""
        return self._judge(self._original)

    def approximation(self, stacks: Stacks) -> dict[str, float]:
        """Quality of the original with some of its experts replaced."""
        model = copy.deepcopy(self._original)
        write_stacks(model, stacks)
        return self._judge(model)

    def directory(self, folder: Path) -> dict[str, float]:
        """Quality of the model in a directory."""
        return self._judge(_load(folder))

    def _judge(self, model: Any) -> dict[str, float]:
        reference = None if model is self._original else self._original
        found = evaluate_model(model, self._windows, self._bytes_per_token, reference=reference)
        if found.kl is None or found.agreement is None:
            return {"perplexity": found.perplexity}
        return {"perplexity": found.perplexity, "kl": found.kl, "agreement": found.agreement}


def _load(model: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()


def globe_row(config: QualityConfig, keep: float, evaluator: Evaluator) -> dict[str, Any]:
    """GloBE at its defaults: compressed to a directory, loaded from it and judged."""
    settings = CompressConfig(keep=keep, steps=config.steps, seed=config.seed, layers=config.layers)
    with tempfile.TemporaryDirectory() as folder:
        report = compress(resolve_model(config.model), Path(folder) / "compressed", settings)
        quality = evaluator.directory(Path(folder) / "compressed")
    bank = report.banks[0]
    return {
        "keep": keep,
        "method": "GloBE",
        "shape": f"R={bank.rank} M={bank.num_bases}",
        "stored": report.kept,
        "error": report.error,
        **report.family_errors(),
        **quality,
        "seconds": report.seconds,
    }


def rival_row(
    keep: float, method: str, stacks: Stacks, approximation: Approximation, evaluator: Evaluator
) -> dict[str, Any]:
    """A rival's approximation, judged."""
    return {
        "keep": keep,
        "method": method,
        "shape": approximation.shape,
        "stored": approximation.stored_parameters / sum(stack.numel() for stack in stacks.values()),
        **family_errors(stacks, approximation.stacks),
        **evaluator.approximation(approximation.stacks),
        "seconds": approximation.seconds,
    }


def rows_at(
    config: QualityConfig, keep: float, stacks: Stacks, dtype: torch.dtype, evaluator: Evaluator
) -> Iterator[dict[str, Any]]:
    """All methods at one budget. MoBE comes as published, with R = P, and with the shape that serves it best."""
    yield globe_row(config, keep, evaluator)
    yield rival_row(keep, "truncated SVD", stacks, truncated_svd(stacks, keep, dtype), evaluator)
    shape_of = next(iter(stacks.values())).shape
    published, best = published_shape(*shape_of, keep), best_shape(*shape_of, keep)
    if published is not None:
        approximation = mobe(stacks, published, config.mobe_epochs, dtype)
        yield rival_row(keep, "MoBE, R = P", stacks, approximation, evaluator)
    if best != published:
        approximation = mobe(stacks, best, config.mobe_epochs, dtype)
        yield rival_row(keep, "MoBE, R < P", stacks, approximation, evaluator)


def add_ratios(rows: list[dict[str, Any]], original: float) -> None:
    """Add what does not depend on the machine: the rise of the perplexity, and error and time in units of GloBE's."""
    globe = {row["keep"]: row for row in rows if row["method"] == "GloBE"}
    for row in rows:
        row["perplexity_rise"] = row["perplexity"] / original - 1
        if "keep" in row:
            row["error_over_globe"] = row["error"] / globe[row["keep"]]["error"]
            row["seconds_over_globe"] = row["seconds"] / globe[row["keep"]]["seconds"]


def judge_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Perplexity at keep 0.75, and at every budget error and divergence against the best rival's."""
    claims: list[Claim] = []
    for globe in (row for row in rows if row["method"] == "GloBE"):
        keep, rise = globe["keep"], globe["perplexity_rise"]
        if keep == CLAIMED_KEEP:
            statement = f"keep {keep:g}: GloBE's perplexity is within {PERPLEXITY_RISE:.0%} of the original's"
            claims.append(Claim(statement, f"{rise:+.2%}", rise <= PERPLEXITY_RISE))
        rivals = [row for row in rows if row.get("keep") == keep and row is not globe]
        for key, name in (("error", "error"), ("kl", "KL divergence")):
            best = min(rivals, key=lambda row: row[key])
            measured = (
                f"{globe[key]:.4g} with {globe['stored']:.3f} of the parameters stored; "
                f"{best['method']} {best[key]:.4g} with {best['stored']:.3f}"
            )
            claims.append(
                Claim(f"keep {keep:g}: GloBE's {name} is below every rival's", measured, globe[key] < best[key])
            )
    return claims


def main(config: QualityConfig) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    logging.disable_progress_bar()
    began, console = time.monotonic(), Console()
    model = resolve_model(config.model)
    stacks, dtype = read_stacks(model, config.layers)
    evaluator = Evaluator(model, config.max_tokens)
    rows: list[dict[str, Any]] = [{"method": "original", **evaluator.original()}]
    nothing = {key: torch.zeros_like(stack) for key, stack in stacks.items()}
    rows.append({"method": "without these experts", **evaluator.approximation(nothing)})
    for keep in config.keeps:
        for row in rows_at(config, keep, stacks, dtype, evaluator):
            rows.append(row)
            progress = f"{time.monotonic() - began:5.0f} s  keep {keep:g}  {row['method']}: error {row['error']:.4f}"
            console.print(f"{progress}  perplexity {row['perplexity']:.3f}", highlight=False)
    add_ratios(rows, rows[0]["perplexity"])
    claims = judge_claims(rows)
    title = f"Quality of {Path(model).name} on {config.max_tokens} held-out tokens, {config.threads} threads"
    print_table(title, rows, COLUMNS)
    print_claims(claims)
    write_record(config.output, "quality", config, rows, claims)


if __name__ == "__main__":
    main(tyro.cli(QualityConfig, description=__doc__))
