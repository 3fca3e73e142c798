"""A picture of how a fit went."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from globe.report.style import STYLE
from globe.train.result import MEANING, FitResult


def draw_trajectory(result: FitResult, path: Path) -> None:
    """Error, schedules, and sparsity of the codes over the steps, one below the other, as a PNG or whatever the
    suffix names."""
    steps = [record.step for record in result.steps]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 7), layout="constrained")
        error, schedule, sparsity = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
        error.plot(steps, [record.raw_error for record in result.steps], color="0.7", label="of this step's factors")
        error.plot(steps, result.history, color="C0", label="of the best factors so far")
        error.set_ylabel("relative error, as the fit weighs it")
        error.set_title(f"relative error {result.history[-1]:.4f}: {MEANING[result.outcome]}")
        schedule.plot(steps, [record.activation_lambda for record in result.steps], label="λ (nonlinearity)")
        schedule.plot(steps, [record.route_beta for record in result.steps], "--", label="β (weight-aware targets)")
        schedule.plot(steps, [record.step_size for record in result.steps], ":", label="step size")
        schedule.set_ylabel("schedule")
        sparsity.plot(steps, [record.median_support for record in result.steps], label="median support")
        sparsity.set_ylabel("bases per expert")
        sparsity.set_ylim(bottom=0)
        temperature = sparsity.twinx()
        temperature.spines["right"].set_visible(True)
        temperature.grid(False)
        temperature.plot(steps, [record.temperature for record in result.steps], "C1--", label="temperature")
        temperature.set_ylabel("temperature")
        sparsity.set_xlabel("step")
        for axes in (error, schedule):
            axes.legend()
        handles = [*sparsity.get_lines(), *temperature.get_lines()]
        sparsity.legend(handles=handles, loc="lower right")
        figure.savefig(path)
