"""Error per step of both solvers from every warm start, and whether what is promised about a fit holds.

    python -m benchmarks.convergence

One layer's experts, all families in one bank. Promised: the error never rises, no metric is NaN or infinite, and the
temperature of codes on the simplex stays inside its bounds while it steers the support. Writes a table, a record with
every curve, and a picture.
"""

from __future__ import annotations

import dataclasses
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.tables import Column, print_claims, print_table
from globe import CompressConfig, FitConfig, FitResult, fit_bank
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.experts.stack import read_stack
from globe.model.configuration import expert_layers
from globe.plan.scopes import make_plan
from globe.report.style import STYLE
from globe.terms import CodeMap, Solver, WarmStartName
from globe.train.result import StepRecord

COLUMNS = (
    Column("solver", "solver"),
    Column("codes", "codes"),
    Column("warm_start", "warm start"),
    Column("start_error", "start", ".4f"),
    Column("error", "error", ".4f"),
    Column("num_steps", "steps", "d"),
    Column("outcome", "outcome"),
    Column("seconds", "seconds", ".1f"),
    Column("largest_rise", "largest rise", ".1e"),
    Column("finite", "finite"),
    Column("temperatures", "temperature"),
    Column("support", "support", "g"),
    Column("target_support", "target", "g"),
)


@dataclasses.dataclass(frozen=True)
class ConvergenceConfig:
    """What is fitted."""

    model: str = "shipped"
    """`shipped`, a local directory or a Hub id."""
    layer: int = 12
    """Its experts are fitted."""
    keep: float = 0.625
    """Stored parameters over the original ones."""
    steps: int = 100
    """Steps of each fit at most."""
    support: int = 6
    """Median support that codes on the simplex are steered to."""
    seed: int = 0
    """Seeds the warm starts."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "convergence.json"
    """Where the record is written; the picture lies beside it."""


def run(experts: Tensor, config: FitConfig) -> dict[str, Any]:
    """One fit, what it promised, and its curve."""
    began = time.monotonic()
    result = fit_bank(experts, config)
    temperatures = [record.temperature for record in result.steps]
    simplex = config.codes != "ridge"
    return {
        "solver": config.solver,
        "codes": config.codes,
        "warm_start": config.warm_start,
        "start_error": result.history[0],
        "error": result.history[-1],
        "num_steps": len(result.steps) - 1,
        "outcome": result.outcome,
        "seconds": time.monotonic() - began,
        "largest_rise": max(after - before for before, after in pairwise(result.history)),
        "finite": "yes" if all_finite(result) else "NO",
        "within_bounds": all(config.min_temperature <= t <= config.max_temperature for t in temperatures),
        "temperatures": f"{min(temperatures):.2f} to {max(temperatures):.2f}" if simplex else None,
        "support": result.steps[-1].median_support,
        "target_support": config.support,
        "history": [float(f"{error:.6g}") for error in result.history],
        "trajectory": [float(f"{record.raw_error:.6g}") for record in result.steps],
    }


def all_finite(result: FitResult) -> bool:
    """Whether every step's record and every factor is finite."""
    names = [field.name for field in dataclasses.fields(StepRecord)]
    factors = (result.factors.adapters, result.factors.codes, result.factors.bases)
    return all(math.isfinite(getattr(record, name)) for record in result.steps for name in names) and all(
        bool(factor.isfinite().all()) for factor in factors
    )


def fits(rank: int, num_bases: int, config: ConvergenceConfig) -> list[FitConfig]:
    """Both solvers: signed codes from every warm start, and every simplex map with a target support."""
    base = FitConfig(rank=rank, num_bases=num_bases, max_steps=config.steps, seed=config.seed)
    signed = [
        dataclasses.replace(base, solver=solver, warm_start=start)
        for solver in get_args(Solver)
        for start in get_args(WarmStartName)
    ]
    on_simplex = [
        dataclasses.replace(base, solver=solver, codes=codes, support=min(config.support, num_bases))
        for solver in get_args(Solver)
        for codes in get_args(CodeMap)
        if codes != "ridge"
    ]
    return signed + on_simplex


def judge_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """What every fit must keep."""
    rise = max(row["largest_rise"] for row in rows)
    finite = sum(row["finite"] == "yes" for row in rows)
    bounded = sum(row["within_bounds"] for row in rows)
    return [
        Claim("the error never rises from one step to the next", f"largest rise {rise:.1e}", rise <= 0),
        Claim("no metric and no factor is NaN or infinite", f"{finite} of {len(rows)} fits", finite == len(rows)),
        Claim("the temperature stays inside its bounds", f"{bounded} of {len(rows)} fits", bounded == len(rows)),
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against step: one panel for each solver, one for codes on the simplex."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.5), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for axis, solver in zip(axes, get_args(Solver), strict=False):
            axis.set_title(f"{solver}, signed codes, by warm start")
            for row in rows:
                if row["solver"] == solver and row["codes"] == "ridge":
                    axis.plot(row["history"], label=row["warm_start"])
        axes[2].set_title("codes on the simplex, by solver and map")
        for row in rows:
            if row["codes"] != "ridge":
                dashed = "--" if row["solver"] == "am" else "-"
                axes[2].plot(row["history"], dashed, label=f"{row['solver']}, {row['codes']}")
        for axis in axes:
            axis.set(xlabel="step", yscale="log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.legend()
        axes[0].set_ylabel("relative error of the best factors so far")
        figure.savefig(path)


def main(config: ConvergenceConfig) -> None:
    torch.set_num_threads(config.threads)
    checkpoint = open_checkpoint(resolve_model(config.model))
    layers = {layer.index: layer for layer in expert_layers(checkpoint)}
    plan = make_plan(list(layers.values()), CompressConfig(keep=config.keep, layers=(config.layer,)))
    bank = plan[0].banks[0]
    experts = read_stack(checkpoint, layers, bank).weights
    shape = bank.shape
    rows = [run(experts, fit) for fit in fits(shape.rank, shape.num_bases, config)]
    claims = judge_claims(rows)
    numbers = f"E={shape.num_matrices} P={shape.rows} D={shape.columns} R={shape.rank} M={shape.num_bases}"
    print_table(f"Layer {config.layer}, keep {config.keep:g}: {numbers}, {config.threads} threads", rows, COLUMNS)
    print_claims(claims)
    write_record(config.output, "convergence", config, rows, claims)
    draw(rows, config.output.with_suffix(".png"))
    if not all(claim.holds for claim in claims):
        raise SystemExit("a fit broke a promise")


if __name__ == "__main__":
    main(tyro.cli(ConvergenceConfig, description=__doc__))
