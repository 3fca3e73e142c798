"""What came of a sweep: a table on the terminal, the same as CSV, and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from globe.checkpoint.evaluation import Evaluation
from globe.checkpoint.manifest import write_listed
from globe.report.style import INK, MARKERS, STYLE, plain_log_ticks
from globe.sweeps.settings import AXES, Setting
from globe.sweeps.sweep import PointRecord, SweepResult
from globe.terminal import Terminal, one_line, visible
from globe.units import byte_size

TABLE, PICTURE = "sweep.csv", "sweep.png"


def show_sweep(console: Terminal, result: SweepResult, output: Path) -> None:
    """Print the table, and write table and picture into the sweep's folder."""
    console.print(sweep_table(result))
    write_listed(output, TABLE, table_csv(result))
    failed = sum(point.failure is not None for point in result.points)
    if failed < len(result.points):
        write_listed(output, PICTURE, draw_sweep(result))
        console.print(f"the same with all figures in {output / TABLE}, drawn in {output / PICTURE}", soft_wrap=True)
    if failed:
        console.print(f"{failed} of {len(result.points)} points failed", style="yellow")


def sweep_table(result: SweepResult) -> Table:
    """A row for each point; what all points share is in the title."""
    varying = result.config.varying()
    shared = ", ".join(
        f"{axis.replace('_', ' ')} {value}" for axis, value in result.points[0].settings.items() if axis not in varying
    )
    table = Table(
        title=f"{result.source}: {shared}" if shared else result.source,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for axis in varying:
        table.add_column(axis.replace("_", " "))
    for name in ("relative error", "KL", "perplexity", "size", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    blank = [""] * (len(varying) - 1)
    original = ["", "0", f"{result.original.perplexity:.3f}", byte_size(result.original_bytes), ""]
    table.add_row(*(["original", *blank] if varying else []), *original)
    for point in result.points:
        settings = [str(point.settings[axis]) for axis in varying]
        table.add_row(*settings, *_cells(point))
    failures = [one_line(point.failure) for point in result.points if point.failure is not None]
    if failures:
        table.caption = "\n".join(dict.fromkeys(failures))
        table.caption_justify = "left"
    return table


def _cells(point: PointRecord) -> list[str | Text]:
    if point.evaluation is None:
        return [Text("failed", "red"), "", "", "", f"{point.seconds:.1f}"]
    return [
        f"{point.error:.4f}",
        f"{point.evaluation.kl:.5f}",
        f"{point.evaluation.perplexity:.3f}",
        byte_size(point.compressed_bytes or 0),
        f"{point.seconds:.1f}",
    ]


def table_csv(result: SweepResult) -> bytes:
    """All settings and figures of every point as CSV, the original first."""
    rows = [_row({}, result.original_bytes, result.original)]
    rows += [
        {
            **_row(point.settings, point.compressed_bytes, point.evaluation),
            "kept": point.kept,
            "error": point.error,
            **{f"error_{family}": error for family, error in (point.family_errors or {}).items()},
            "seconds": point.seconds,
            "failure": point.failure,
        }
        for point in result.points
    ]
    names = dict.fromkeys(name for row in rows[::-1] for name in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(names))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _row(settings: Mapping[str, Setting], nbytes: int | None, evaluation: Evaluation | None) -> dict[str, Any]:
    quality = ("perplexity", "bits_per_byte", "kl", "kl_error", "agreement", "num_tokens")
    return {
        **{axis: settings.get(axis, "original" if axis == AXES[0] else None) for axis in AXES},
        "bytes": nbytes,
        **{name: getattr(evaluation, name, None) for name in quality},
        **({} if evaluation is None else {score.name: score.value for score in evaluation.tasks}),
    }


def draw_sweep(result: SweepResult) -> bytes:
    """KL to the original and relative error of every finished point: against the bytes where keep varies, a curve for
    each choice of the other axes; side by side where it does not. As a PNG file."""
    points = [point for point in result.points if point.failure is None]
    with mpl.rc_context(STYLE):
        draw = _draw_curves if "keep" in result.config.varying() else _draw_rows
        picture = io.BytesIO()
        draw(points, result).savefig(picture, format="png")
    return picture.getvalue()


def _draw_curves(points: Sequence[PointRecord], result: SweepResult) -> Figure:
    others = [axis for axis in result.config.varying() if axis != "keep"]
    curves: dict[str, list[PointRecord]] = {}
    for point in points:
        curves.setdefault(_label(point, others), []).append(point)
    figure = Figure(figsize=(9, max(3.8, 1.2 + 0.2 * len(curves))), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 2)
    named = set[tuple[Setting, int]]()
    for number, (label, curve) in enumerate(curves.items()):
        curve = sorted(curve, key=lambda point: point.compressed_bytes or 0)
        size = [100 * (point.compressed_bytes or 0) / result.original_bytes for point in curve]
        marker, line = MARKERS[number % len(MARKERS)], ("-", "--", ":")[number // len(MARKERS) % 3]
        axes[0].plot(size, _divergences(curve), marker=marker, linestyle=line, label=label)
        for place, value, point in zip(size, _divergences(curve), curve, strict=True):
            if (name := (point.settings["keep"], round(place))) not in named:  # curves that meet need it once
                axes[0].annotate(f"keep {name[0]}", (place, value), (4, 4), textcoords="offset points", fontsize=7)
            named.add(name)
        axes[1].plot(size, [point.error or 0.0 for point in curve], marker=marker, linestyle=line, label=label)
    _name(axes, result, points)
    for axis in axes:
        axis.axvline(100, color=INK, linestyle=":", linewidth=1)
        axis.annotate("original", (100, 1), (-4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                      rotation=90, ha="right", va="top", fontsize=7)  # fmt: skip
        axis.set_xlabel("bytes of the whole model, % of the original")
    if others:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _draw_rows(points: Sequence[PointRecord], result: SweepResult) -> Figure:
    labels = [_label(point, result.config.varying()) or f"keep {point.settings['keep']}" for point in points]
    places = range(len(points))
    figure = Figure(figsize=(9, 1.4 + 0.24 * len(points)), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    axes[0].plot(_divergences(points), places, "o")
    axes[1].plot([point.error or 0.0 for point in points], places, "o")
    _name(axes, result, points, along_x=True)
    axes[0].set_yticks(places, labels)
    axes[0].set_ylim(len(points) - 0.5, -0.5)
    return figure


def _name(axes: Sequence[Axes], result: SweepResult, points: Sequence[PointRecord], along_x: bool = False) -> None:
    """Titles say what the value axis holds; the divergence is on a logarithmic scale where it spans a factor of 5."""
    axes[0].set_title("KL to the original, nats per token")
    axes[1].set_title("relative error of the experts as stored")
    divergences = _divergences(points)
    wide = min(divergences) > 0 and max(divergences) > 5 * min(divergences)
    most = max(divergences), max(point.error or 0.0 for point in points)
    for axis, logarithmic, top in zip(axes, (wide, False), most, strict=True):
        scale, limit = (axis.set_xscale, axis.set_xlim) if along_x else (axis.set_yscale, axis.set_ylim)
        if logarithmic:
            scale("log")
            plain_log_ticks(axis.xaxis if along_x else axis.yaxis)
        else:
            limit(0, 1.08 * top or None)
    judged = f"{result.source}, judged on {result.original.num_tokens} tokens of {result.config.evaluate.text}"
    axes[0].figure.suptitle(visible(judged), x=0.01, horizontalalignment="left", fontsize=11, parse_math=False)


def _divergences(points: Sequence[PointRecord]) -> list[float]:
    return [point.evaluation.kl or 0.0 for point in points if point.evaluation is not None]


def _label(point: PointRecord, axes: Sequence[str]) -> str:
    return ", ".join(
        str(point.settings[axis]) if axis not in ("layers", "scope") else f"{axis} {point.settings[axis]}"
        for axis in axes
    )
