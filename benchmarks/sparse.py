"""Sparse codes: error against compose cost by support, for every code map, and the ways to a support.

    python -m benchmarks.sparse

Runs of layers share one bank. Composing an expert costs support x R / P multiply-adds per element; the rest of the cost
does not depend on the codes. The ways to signed sparse codes that lost live here, beside the one that `support` uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.tables import Column, print_claims, print_table
from globe import CompressConfig, FitConfig, fit_bank
from globe.bank.codes import pursue_codes, support, top_mask
from globe.bank.linalg import norms
from globe.bank.objective import Problem, Projection
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.experts.stack import read_stack
from globe.init.warm_start import warm_start
from globe.model.configuration import expert_layers
from globe.plan.scopes import make_plan
from globe.terms import CodeMap
from globe.train.parts import ExpertParts
from globe.train.schedule import step_length
from globe.train.varpro import VariableProjection

COLUMNS = (
    Column("way", "way"),
    Column("codes", "codes"),
    Column("target_support", "target", "d"),
    Column("support", "support", "g"),
    Column("compose", "support R / P", ".1f"),
    Column("error", "error", ".4f"),
)


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """What is fitted."""

    model: str = "shipped"
    """`shipped`, a local directory or a Hub id."""
    layers: tuple[int, ...] = (5, 6, 7, 8)
    """Layers whose experts, of all families, share one bank."""
    num_bases: int = 64
    """M; R = P."""
    supports: tuple[int, ...] = (64, 32, 16, 8, 4)
    """Supports, of every code map."""
    ways_supports: tuple[int, ...] = (16, 4)
    """Supports at which the ways to signed sparse codes are compared."""
    steps: int = 100
    """Steps of each fit."""
    seed: int = 0
    """Seeds the warm starts."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "sparse.json"
    """Where the record is written; the picture lies beside it."""


class Cut(VariableProjection):
    """Variable projection whose signed codes are cut after every step, by a rule that sees their sizes and the step."""

    def __init__(self, problem: Problem, codes: Tensor, bases: Tensor, rule: Callable[[Tensor, int], Tensor]) -> None:
        self.count, self._rule = 0, rule
        parts = ExpertParts.in_memory(problem)
        super().__init__(parts, codes, bases.clone(), "tanh", "ridge", 0.5, 1.0, energy=parts.energy())

    def evaluate(self) -> Projection:
        size = self._scores.value * norms(self.bases)
        self._scores.value.mul_(self._rule(size.abs(), self.count))
        self.count += 1
        return super().evaluate()


def ways(num_bases: int, num_kept: int, steps: int) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """What becomes of each code (a factor, by the sizes and the step): the proximal maps that were tried."""

    def hard(size: Tensor, _: int) -> Tensor:
        return top_mask(size, num_kept).to(size)

    def gradual(size: Tensor, step: int) -> Tensor:
        progress = min(1.0, max(0.0, (step / steps - 0.1) / 0.5))
        return top_mask(size, round(num_bases + progress * (num_kept - num_bases))).to(size)

    def soft(size: Tensor, step: int) -> Tensor:
        """ℓ1's proximal map, its threshold growing to the size of the first code to go, then the hard one."""
        if step > 0.6 * steps:
            return hard(size, step)
        threshold = size.topk(num_kept + 1, dim=1).values[:, -1:] * min(1.0, step / (0.6 * steps)) / 10
        return (1 - threshold / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_min(0)

    return {"gradual pruning": gradual, "iterative hard thresholding": hard, "soft thresholding (l1)": soft}


def matching_pursuit(targets: Tensor, bases: Tensor, num_kept: int) -> Tensor:
    """Orthogonal matching pursuit (Pati 1993), batched: the atom that the residual resembles most, then least squares.

    `targets` (E, R, D), `bases` (M, R, D); returns codes (E, M).
    """
    s, b = targets.flatten(1), torch.nn.functional.normalize(bases.flatten(1), dim=1)
    gram, cross = b @ b.mT, s @ b.mT
    codes, mask = torch.zeros_like(cross), torch.zeros_like(cross, dtype=torch.bool)
    for _ in range(num_kept):
        mask.scatter_(1, (cross - codes @ gram).abs().masked_fill(mask, -1).argmax(1, keepdim=True), True)
        kept = mask.nonzero()[:, 1].view(len(mask), -1)
        some = torch.linalg.solve(gram[kept[:, :, None], kept[:, None, :]], cross.gather(1, kept)[:, :, None])
        codes = torch.zeros_like(cross).scatter(1, kept, some[..., 0])
    return codes / norms(bases)


@torch.no_grad()
def run_ways(weights: Tensor, num_kept: int, config: SparseConfig) -> list[dict[str, Any]]:
    """Signed codes with `num_kept` non-zeros from the dense start, by every way that lost."""
    problem = Problem(weights)
    start = warm_start(weights, weights.shape[1], config.num_bases, seed=config.seed)
    rows: list[dict[str, Any]] = []

    def follow(way: str, codes: Tensor, rule: Callable[[Tensor, int], Tensor]) -> None:
        best = float("inf")
        solver = Cut(problem, codes, start.bases, rule)
        solver.evaluate()
        for step in range(1, config.steps + 1):
            solver.move(step_length(step, config.steps), 1.0)
            objective = solver.evaluate().objective
            if int(support(solver.codes).max()) <= num_kept:
                best = min(best, objective)
        rows.append(row(way, "ridge", num_kept, solver.codes, best**0.5))

    for way, rule in ways(config.num_bases, num_kept, config.steps).items():
        follow(way, start.codes, rule)
    pursued = matching_pursuit(start.targets, start.bases, num_kept)
    follow("orthogonal matching pursuit, then fixed", pursued, lambda _, __: (pursued != 0).to(pursued))
    thresholded = pursue_codes(start.codes, start.targets, start.bases, num_kept)
    follow("hard-thresholding pursuit, then fixed", thresholded, lambda _, __: (thresholded != 0).to(thresholded))
    return rows


def row(way: str, codes: str, target: int, found: Tensor, error: float) -> dict[str, Any]:
    """One line of the table."""
    median = float(support(found).double().median())
    compose = median  # multiply-adds that mixing the bases takes, per element of an expert, R being P
    return {"way": way, "codes": codes, "target_support": target, "support": median, "compose": compose, "error": error}


def run_maps(weights: Tensor, config: SparseConfig) -> list[dict[str, Any]]:
    """The product's fit of every code map at every support."""
    rows: list[dict[str, Any]] = []
    for codes in get_args(CodeMap):
        for target in config.supports:
            fit = FitConfig(
                rank=weights.shape[1],
                num_bases=config.num_bases,
                codes=codes,
                support=target,
                max_steps=config.steps,
                seed=config.seed,
            )
            result = fit_bank(weights, fit)
            found = result.factors.codes
            rows.append(row("support", codes, target, found, result.history[-1]))
            print(rows[-1], flush=True)
    return rows


def judge_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """What `support` promises."""
    asked = [found for found in rows if found["way"] == "support"]
    furthest = max(abs(found["support"] - found["target_support"]) for found in asked)
    signed = {found["target_support"]: found["error"] for found in asked if found["codes"] == "ridge"}
    others = [found for found in rows if found["way"] != "support"]
    margins = [signed[found["target_support"]] / found["error"] - 1 for found in others]
    return [
        Claim("the median support is within 1 of what was asked", f"furthest {furthest:g}", furthest <= 1),
        Claim("no other way to a support ends lower", f"nearest {max(margins):+.1%}", max(margins) < 0),
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against compose cost, by code map and by way."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for codes in get_args(CodeMap):
        mine = [found for found in rows if (found["way"], found["codes"]) == ("support", codes)]
        line = sorted((found["compose"], found["error"]) for found in mine)
        axis.plot(*zip(*line, strict=True), "o-", label=codes)
    for way in dict.fromkeys(found["way"] for found in rows if found["way"] != "support"):
        points = [(found["compose"], found["error"]) for found in rows if found["way"] == way]
        axis.plot(*zip(*points, strict=True), "x", label=f"ridge, {way}")
    axis.set(xlabel="compose cost, support x R / P multiply-adds per element", ylabel="relative error", xscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(config: SparseConfig) -> None:
    torch.set_num_threads(config.threads)
    checkpoint = open_checkpoint(resolve_model(config.model))
    layers = {layer.index: layer for layer in expert_layers(checkpoint)}
    plan = make_plan(list(layers.values()), CompressConfig(keep=0.75, layers=config.layers, scope="model"))
    weights = read_stack(checkpoint, layers, plan[0].banks[0]).weights
    rows = [found for num_kept in config.ways_supports for found in run_ways(weights, num_kept, config)]
    for found in rows:
        print(found, flush=True)
    rows += run_maps(weights, config)
    claims = judge_claims(rows)
    num_experts, height, width = weights.shape
    shape = f"E={num_experts} P={height} D={width} R={height} M={config.num_bases}"
    print_table(f"Sparse codes, {shape}, {config.steps} steps, {config.threads} threads", rows, COLUMNS)
    print_claims(claims)
    write_record(config.output, "sparse", config, rows, claims)
    draw(rows, config.output.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(SparseConfig, description=__doc__))
