"""How to split a budget between adapters and bank: error against rank at equal stored parameters.

    python -m benchmarks.shapes

The rule in `globe.plan.budget.Keep` (the share of the budget that goes to the adapters) is read off this table.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.record import RESULTS, write_record
from benchmarks.tables import Column, print_table
from globe import CompressConfig, FitConfig, fit_bank
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.experts.stack import read_stack
from globe.model.configuration import expert_layers
from globe.plan.scopes import make_plan

COLUMNS = (
    Column("layer", "layer", "d"),
    Column("keep", "keep", "g"),
    Column("rank", "rank", "d"),
    Column("num_bases", "bases", "d"),
    Column("stored", "stored", ".3f"),
    Column("adapter_share", "adapters' share", ".2f"),
    Column("error", "error", ".4f"),
    Column("chosen", "chosen"),
)


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """What is fitted."""

    model: str = "shipped"
    """`shipped`, a local directory or a Hub id."""
    layers: tuple[int, ...] = (2, 9)
    """Layers whose experts are fitted, each with one bank for all families."""
    keeps: tuple[float, ...] = (0.75, 0.625, 0.5, 0.35)
    """Budgets."""
    rank_ratios: tuple[float, ...] = (1.0, 0.92, 0.83, 0.75, 0.67, 0.58, 0.5)
    """Ranks over P."""
    steps: int = 150
    """Steps of each fit."""
    seed: int = 0
    """Seeds the warm starts."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "shapes.json"
    """Where the record is written."""


def main(config: ShapesConfig) -> None:
    torch.set_num_threads(config.threads)
    checkpoint = open_checkpoint(resolve_model(config.model))
    layers = {layer.index: layer for layer in expert_layers(checkpoint)}
    rows: list[dict[str, Any]] = []
    for index in config.layers:
        for keep in config.keeps:
            plan = make_plan(list(layers.values()), CompressConfig(keep=keep, layers=(index,)))
            bank = plan[0].banks[0]
            chosen, experts = bank.shape, read_stack(checkpoint, layers, bank).weights
            num_experts, height, width = experts.shape
            ranks = {round(ratio * height) for ratio in config.rank_ratios} | {chosen.rank}
            for rank in sorted(ranks, reverse=True):
                spare = keep * experts.numel() - num_experts * height * rank
                num_bases = min(num_experts, int(spare / (rank * width + num_experts)))
                if num_bases < 1:
                    continue
                fit = FitConfig(rank=rank, num_bases=num_bases, max_steps=config.steps, seed=config.seed)
                result = fit_bank(experts, fit)
                stored = result.factors.num_parameters
                rows.append(
                    {
                        "layer": index,
                        "keep": keep,
                        "rank": rank,
                        "num_bases": num_bases,
                        "stored": stored / experts.numel(),
                        "adapter_share": num_experts * height * rank / stored,
                        "error": result.history[-1],
                        "chosen": "chosen" if (rank, num_bases) == (chosen.rank, chosen.num_bases) else "",
                    }
                )
    print_table(f"Rank against bases, {config.steps} steps, {config.threads} threads", rows, COLUMNS)
    write_record(config.output, "shapes", config, rows, [])


if __name__ == "__main__":
    main(tyro.cli(ShapesConfig, description=__doc__))
