"""Error against time: MoBE's published loop, and GloBE from its quickest settings to its most patient ones.

python -m benchmarks.race

Both get the same layers of the model and the same budget: keep 0.625 with R = P, MoBE with a bank for each layer and
kind of matrix as published, GloBE with one for the three kinds of a layer, and one for all the layers. Times are of the
process, so that what else runs on the machine counts little; the time that MoBE's warm start takes is left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.rivals import mobe
from benchmarks.stacks import read_stacks
from benchmarks.tables import Column, print_claims, print_table
from globe.bank_shape import BankShape
from globe.checkpoint.shipped import resolve_model
from globe.plan.scopes import compact
from globe.report.style import STYLE
from globe.terms import FAMILIES
from globe.train.config import FitConfig
from globe.train.fit_banks import fit_bank

LADDER = (
    (4, 20),
    (8, 30),
    (12, 40),
    (16, 50),
    (24, 60),
    (32, 70),
    (32, 90),
    (48, 120),
    (64, 200),
    (64, 500),
    (64, 1000),
    (64, 2000),
)
"""Alternations of the warm start and steps of GloBE's fits."""
WIDE_LADDER = ((16, 60), (32, 120), (64, 250), (64, 500), (64, 1000), (64, 1700))
"""The same where all layers share a bank."""
CLAIMED_TIME, CLAIMED_ERROR, CLAIMED_WIDE_ERROR = 50, 0.12, 0.15
OVERSPEND = 1.0025
"""GloBE may store so much more than MoBE, so that rounding the number of bases down does not cost it one."""
COLUMNS = (
    Column("method", "method"),
    Column("align_steps", "alignments", "d"),
    Column("steps", "steps", "d"),
    Column("stored", "stored", ".4f"),
    Column("error", "error", ".4f"),
    Column("time_over_mobe", "time / MoBE's", ".4f"),
)


@dataclasses.dataclass(frozen=True)
class RaceConfig:
    """Who runs, and how far."""

    model: str = "shipped"
    """`shipped`, a local directory or a Hub id."""
    layers: tuple[int, ...] | None = None
    """Layers that are fitted one by one (None: all); the errors are root mean squares over them, the times sums."""
    keep: float = 0.625
    """Stored parameters over the original ones."""
    mobe_epochs: int = 10_000
    """MoBE's longest run."""
    reference_epochs: int = 6000
    """MoBE's run whose error GloBE is to reach."""
    wide: bool = True
    """Also one bank for all of these layers."""
    seed: int = 0
    """Recorded; nothing here is random."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "race.json"
    """Where the record is written; the picture goes beside it."""


def run_mobe(stacks: list[Tensor], shape: mobe.Shape, config: RaceConfig) -> list[dict[str, Any]]:
    """Errors and seconds of MoBE along its epochs, all layers together."""
    marks = sorted({*range(0, config.mobe_epochs + 1, 500), config.reference_epochs})
    errors: dict[int, list[Tensor]] = {mark: [] for mark in marks}
    seconds = dict.fromkeys(marks, 0.0)
    for experts in stacks:
        start, lowest, began = (
            mobe.warm_start(experts, *shape),
            torch.full((len(experts),), torch.inf),
            time.process_time(),
        )

        def watch(epoch: int, losses: Tensor) -> None:
            torch.minimum(lowest, losses, out=lowest)  # noqa: B023
            if epoch in errors:
                errors[epoch].append(lowest.clone())  # noqa: B023
                seconds[epoch] += time.process_time() - began  # noqa: B023

        mobe.train(experts, start, config.mobe_epochs, watch)
    return [
        {
            "method": "MoBE",
            "steps": mark,
            "error": float(torch.cat(errors[mark]).mean()) ** 0.5,
            "seconds": seconds[mark],
        }
        for mark in marks
    ]


def run_globe(stacks: list[Tensor], num_bases: int, align_steps: int, steps: int) -> dict[str, Any]:
    """Error and seconds of GloBE, a bank for each of the stacks (E, P, D)."""
    missed = energy = 0.0
    began = time.process_time()
    for experts in stacks:
        fit = FitConfig(rank=experts.shape[1], num_bases=num_bases, align_steps=align_steps, max_steps=steps)
        size = float(experts.square().sum())
        missed += fit_bank(experts, fit).history[-1] ** 2 * size
        energy += size
    seconds = time.process_time() - began
    return {"align_steps": align_steps, "steps": steps, "error": (missed / energy) ** 0.5, "seconds": seconds}


def seconds_to(error: float, rows: list[dict[str, Any]]) -> float | None:
    """The shortest time in which one of the fits reaches an error."""
    return min((row["seconds"] for row in rows if row["error"] <= error), default=None)


def error_at(seconds: float, rows: list[dict[str, Any]]) -> float:
    """The lowest error among the fits that take no longer."""
    return min(row["error"] for row in rows if row["seconds"] <= seconds)


def judge_claims(config: RaceConfig, theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[Claim]:
    reference = next(row for row in theirs if row["steps"] == config.reference_epochs)
    last, layers = theirs[-1], [row for row in ours if row["method"] == "GloBE, a bank for a layer"]
    took = seconds_to(reference["error"], layers)
    claims = [
        Claim(
            f"MoBE's error after {config.reference_epochs} epochs is reached in at most 1/{CLAIMED_TIME} of its time",
            "not reached" if took is None else f"1/{reference['seconds'] / took:.0f}",
            took is not None and took * CLAIMED_TIME <= reference["seconds"],
        )
    ]
    for name, least in (("a layer", CLAIMED_ERROR), ("all layers", CLAIMED_WIDE_ERROR)):
        rows = [row for row in ours if row["method"] == f"GloBE, a bank for {name}"]
        if rows:
            gain = 1 - error_at(last["seconds"] / 5, rows) / last["error"]
            claims.append(
                Claim(
                    f"in a fifth of the time of MoBE's {config.mobe_epochs} epochs the error of a bank for {name} "
                    f"is lower by at least {least:.0%}",
                    f"{gain:.1%}",
                    gain >= least,
                )
            )
    return claims


def draw(path: Path, rows: list[dict[str, Any]], unit: float) -> None:
    """Error against time in units of MoBE's whole run."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.5, 3.6), layout="constrained")
        axes = figure.subplots()
        for method, group in itertools.groupby(rows, key=lambda row: row["method"]):
            points = sorted((row["seconds"] / unit, row["error"]) for row in group if row["seconds"] > 0)
            axes.plot(*zip(*points, strict=True), marker="o", label=method)
        axes.set(xscale="log", yscale="log", xlabel="time over MoBE's whole run", ylabel="relative error")
        axes.set_ylim(top=0.4)
        axes.legend()
        figure.savefig(path)


def main(config: RaceConfig) -> None:
    torch.set_num_threads(config.threads)
    layers, _ = read_stacks(resolve_model(config.model), config.layers)
    indices = sorted({layer for layer, _ in layers})
    stacks = [torch.stack([layers[layer, family] for family in FAMILIES]) for layer in indices]
    stacks = [experts / experts.std(dim=(1, 2, 3), correction=0, keepdim=True) for experts in stacks]
    _, num_experts, rows, columns = stacks[0].shape
    shape = mobe.published_shape(num_experts, rows, columns, config.keep)
    assert shape is not None, f"keep {config.keep} leaves no basis for MoBE with R = P"
    stored = BankShape(num_experts, rows, columns, *shape).share
    theirs = [{**row, "stored": stored} for row in run_mobe(stacks, shape, config)]
    unit = theirs[-1]["seconds"]
    ours: list[dict[str, Any]] = []
    families = [experts.flatten(0, 1) for experts in stacks]
    runs = [("a layer", families, LADDER)]
    if config.wide:
        runs.append(("all layers", [torch.cat(families)], WIDE_LADDER))
    for name, banks, ladder in runs:
        matrices = len(banks[0])
        budget = OVERSPEND * stored * matrices * rows * columns
        num_bases = int((budget - matrices * rows * rows) / (rows * columns + matrices))
        kept = BankShape(matrices, rows, columns, rows, num_bases).share
        for align_steps, steps in ladder:
            row = run_globe(banks, num_bases, align_steps, steps)
            ours.append({"method": f"GloBE, a bank for {name}", "stored": kept, **row})
            print(
                ours[-1]["method"],
                align_steps,
                steps,
                f"{row['error']:.4f}",
                f"1/{unit / row['seconds']:.0f}",
                flush=True,
            )
    everything = [*theirs, *ours]
    for row in everything:
        row["time_over_mobe"] = row["seconds"] / unit
    claims = judge_claims(config, theirs, ours)
    print_table(f"keep {config.keep:g}, R = P, layers {compact(indices)}", everything, COLUMNS)
    print_claims(claims)
    write_record(config.output, "race", config, everything, claims)
    draw(config.output.with_suffix(".png"), everything, unit)


if __name__ == "__main__":
    main(tyro.cli(RaceConfig, description=__doc__))
