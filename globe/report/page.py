"""The record of a compressed model as one HTML page that needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from globe.checkpoint.evaluation import read_evaluations
from globe.checkpoint.manifest import write_listed
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import BankReport, CodedReport, Report, root_mean_square
from globe.checkpoint.writer import write_file
from globe.errors import CheckpointError, GlobeError
from globe.plan.scopes import compact
from globe.report.charts import Chart, Curve, Points, curve_chart, strip_chart, summary_curve
from globe.report.inventory import Bytes, Spectra, bytes_by_kind, read_spectra
from globe.run.observer import clock, describe
from globe.terminal import visible
from globe.terms import FAMILIES
from globe.train.result import MEANING
from globe.units import byte_size, with_error

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name("page.html.j2")
_MAX_CURVES = 6
_ROWS = 16

_TRAJECTORIES = (
    ("error", "{} error of the best factors", True),
    ("raw_error", "{} error of the step's iterate", True),
    ("activation_lambda", "λ, share of the nonlinearity", False),
    ("route_beta", "β, share of weight-aware targets", False),
    ("temperature", "Temperature of the codes", False),
    ("median_support", "Median support, bases per expert", False),
    ("mean_entropy", "Mean entropy of the codes", False),
    ("step_size", "Share of the full step", False),
)


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of the compressed model in `folder`, by default as `report.html` in it; returns its path.

    Raises `CheckpointError` if the folder has no readable report, `OutputError` if the page cannot be written.
    """
    folder = Path(folder)
    path = folder / PAGE if output is None else Path(output)
    page = render(folder).encode()
    if path.parent.resolve() == folder.resolve():
        write_listed(folder, path.name, page)
    else:
        write_file(path, page)
    return path


def render(folder: Path) -> str:
    """The page. What the folder lacks beside its report is said on it."""
    report = Report.read(folder)
    notes: list[str] = []
    is_packed = report.config.get("format") == "compressed-tensors"  # which has no banks
    sizes, spectra = _of_files(folder, notes, is_packed)
    evaluations = read_evaluations(folder)
    try:
        content = {**_content(report, sizes, spectra, notes), "is_packed": is_packed}
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters.update(size=byte_size, with_error=with_error, clock=clock, compact=compact)
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        return visible(template.render(name=folder.resolve().name, evaluations=evaluations, **content))
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the report of {folder} holds values of the wrong kind ({error}): write it again with globe compress"
        ) from error


def _of_files(folder: Path, notes: list[str], is_packed: bool) -> tuple[list[Bytes], list[Spectra]]:
    """What only the tensors tell; notes say what could not be read."""
    sizes, spectra = list[Bytes](), list[Spectra]()
    try:
        checkpoint = open_checkpoint(folder)
        sizes = bytes_by_kind(checkpoint)
        if not is_packed:
            spectra = list(read_spectra(checkpoint))
    except (GlobeError, KeyError) as error:
        notes.append(f"The model's files do not tell all that this page could show: {error}")
    return sizes, spectra


def _content(report: Report, sizes: list[Bytes], spectra: list[Spectra], notes: list[str]) -> dict[str, Any]:
    banks, coded = report.banks, report.coded
    weighing = "Relative" if report.calibration is None else "Weighted relative"
    trajectories, constant = _trajectories(banks, weighing)
    return {
        "report": report,
        "notes": [*_warnings(report), *notes],
        "settings": {name: _setting(value) for name, value in sorted(report.config.items())},
        "num_fits": len(banks),
        "num_matrices": sum(bank.shape.num_matrices for bank in banks),
        "num_stacks": len(coded),
        "layers": report.layers,
        "sizes": sizes,
        "largest": max((max(entry.before, entry.after) for entry in sizes), default=1) or 1,
        "heat": _heat(_errors(report), "{:.4f}", _mean_error),
        "bits": _heat(_bits(coded), "{:.2f}", _mean) if coded else None,
        "budget": _budget(coded),
        "widths": _expert_widths(coded),
        "families": [family for family in FAMILIES if family in report.family_errors()],
        "strips": _strips(report),
        "worst": _worst(report),
        "trajectories": trajectories,
        "constant": constant,
        "spectra": _spectra(spectra),
        "shown_banks": [describe(entry.bank) for entry in spectra],
        "popularity": _popularity(banks),
        "phases": _phases(report),
        "fits": [_fit(bank) for bank in banks],
        "meaning": {bank.outcome: MEANING.get(bank.outcome, "") for bank in banks},
    }


def _setting(value: Any) -> str:
    if value is None:
        return "not set"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _warnings(report: Report) -> Iterator[str]:
    """What a reader should know before trusting the model."""
    banks, calibration = report.banks, report.calibration
    if report.uncalibrated_because is not None and report.config.get("calibrate") != "none":
        yield f"Errors are weighed by the weights alone: {report.uncalibrated_because}"
    if calibration is not None and calibration.streamed_because is not None:
        yield f"The model ran a layer at a time: {calibration.streamed_because}"
    if report.uniform_because is not None and report.config.get("allocation") == "sensitivity":
        yield f"The budget is not shared out by what errors cost: {report.uniform_because}"
    yield from report.notes
    broken = [describe(bank) for bank in banks if bank.outcome == "non_finite"]
    if broken:
        more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
        yield f"These fits met NaN or Inf and kept their best step: {'; '.join(broken[:8])}{more}."
    if fallbacks := sum(_count(bank, "num_fallbacks") or 0 for bank in banks):
        yield f"{fallbacks} adapter solves needed more than a Cholesky factorisation."
    if unused := sum(share == 0 for shares in _popularities(banks).values() for share in shares):
        yield f"{unused} bases are used by no expert."


def _count(bank: BankReport, name: str) -> int | None:
    value = bank.metrics.get(name)
    return value if isinstance(value, int) else None


def _errors(report: Report) -> dict[int, dict[str, float]]:
    """By layer and family, in whichever bank they are, or coded."""
    errors: dict[int, dict[str, float]] = {}
    for bank in report.banks:
        for layer, families in bank.errors.items():
            errors.setdefault(int(layer), {}).update({name: float(error) for name, error in families.items()})
    for part in report.coded:
        errors.setdefault(part.layer, {})[part.family] = part.error
    return dict(sorted(errors.items()))


def _bits(coded: Sequence[CodedReport]) -> dict[int, dict[str, float]]:
    """Stored bits per weight by layer and family, everything counted."""
    bits: dict[int, dict[str, float]] = {}
    for part in coded:
        bits.setdefault(part.layer, {})[part.family] = part.bits
    return dict(sorted(bits.items()))


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def _mean_error(values: Collection[float]) -> float:
    return root_mean_square(values)


def _heat(
    values: Mapping[int, Mapping[str, float]], form: str, mean: Callable[[Collection[float]], float]
) -> dict[str, Any]:
    """Rows of a table by layer and family, in blocks that sit side by side, each cell with its shade from 0 to 1."""
    finite = [value for families in values.values() for value in families.values() if math.isfinite(value)]
    low, high = min(finite), max(finite)
    families = [family for family in FAMILIES if any(family in row for row in values.values())]

    def cell(value: float | None) -> tuple[str, str]:
        if value is None:
            return "–", "0"
        return form.format(value), f"{(value - low) / (high - low) if high > low else 0.5:.2f}"

    rows = [
        {
            "layer": layer,
            "cells": [cell(row.get(family)) for family in families],
            "all": form.format(mean(row.values())),
        }
        for layer, row in values.items()
    ]
    height = _ROWS if len(rows) > _ROWS else len(rows)
    blocks = [rows[start : start + height] for start in range(0, len(rows), height)]
    return {"families": families, "blocks": blocks, "low": form.format(low), "high": form.format(high)}


def _budget(coded: Sequence[CodedReport]) -> list[dict[str, Any]]:
    """Rows of each width: how many, and the share of all that they are."""
    counts = [sum(rows) for rows in zip(*(part.rows_by_width for part in coded), strict=True)]
    total, most = sum(counts) or 1, max(counts, default=1)
    return [
        {"width": f"{width / 2:g}", "rows": count, "share": count / total, "bar": count / most}
        for width, count in enumerate(counts)
        if count
    ]


def _expert_widths(coded: Sequence[CodedReport]) -> list[Chart]:
    """Bits of every expert's entries, by family and layer."""
    top = max((width for part in coded for width in part.expert_widths), default=0.0)
    charts: list[Chart | None] = []
    for family in FAMILIES:
        own = sorted((part for part in coded if part.family == family), key=lambda part: part.layer)
        groups = {str(part.layer): part.expert_widths for part in own}
        charts.append(strip_chart(f"Bits of an entry, {family}", groups, "layer", top=top))
    return [chart for chart in charts if chart is not None]


def _expert_errors(report: Report) -> Iterator[tuple[int, str, list[float]]]:
    for bank in report.banks:
        for layer, families in bank.expert_errors.items():
            for family, errors in families.items():
                yield int(layer), family, [float(error) for error in errors]
    for part in report.coded:
        yield part.layer, part.family, part.expert_errors


def _strips(report: Report) -> list[Chart]:
    by_family: dict[str, dict[int, list[float]]] = {}
    for layer, family, errors in _expert_errors(report):
        by_family.setdefault(family, {})[layer] = errors
    every = [error for _, _, errors in _expert_errors(report) for error in errors if math.isfinite(error)]
    charts: list[Chart | None] = []
    for family in FAMILIES:
        layers = by_family.get(family, {})
        groups = {str(layer): layers[layer] for layer in sorted(layers)}
        charts.append(strip_chart(f"Relative error, {family}", groups, "layer", top=max(every, default=0.0)))
    return [chart for chart in charts if chart is not None]


def _worst(report: Report) -> list[dict[str, Any]]:
    every = [
        {"layer": layer, "family": family, "expert": number, "error": error}
        for layer, family, errors in _expert_errors(report)
        for number, error in enumerate(errors)
        if math.isfinite(error)
    ]
    return sorted(every, key=lambda entry: -entry["error"])[:8]


def _curves(curves: Mapping[str, Points], summary: str) -> list[Curve]:
    """Each under its name, or the median and range of many."""
    if len(curves) <= _MAX_CURVES:
        return [Curve(name if len(curves) > 1 else "", points) for name, points in curves.items()]
    return [summary_curve(summary, curves.values())]


def _trajectories(banks: Sequence[BankReport], weighing: str) -> tuple[list[Chart], list[str]]:
    """A chart for everything that changes over the steps, and what hardly changes in any fit. The error of the steps'
    iterates has none where it is that of the best factors."""
    charts: list[Chart | None] = []
    constant: list[str] = []
    for field, title, logarithmic in _TRAJECTORIES:
        curves = {
            describe(bank): list(zip(bank.steps["step"], bank.steps[field], strict=False))
            for bank in banks
            if bank.steps.get(field)
            and bank.steps.get("step")
            and not (field == "raw_error" and bank.steps[field] == bank.steps.get("error"))
        }
        title, flat = title.format(weighing), [_flat(points) for points in curves.values()]
        if curves and None not in flat:
            ends = [value for value in flat if value is not None]
            low, high = min(ends), max(ends)
            constant.append(f"{title}: {low:.3g}" + ("" if f"{low:.3g}" == f"{high:.3g}" else f" to {high:.3g}"))
        elif curves:
            drawn = _curves(curves, f"median of {len(curves)} banks, and their range")
            charts.append(curve_chart(title, drawn, "step", logarithmic=logarithmic, from_zero=not logarithmic))
    return [chart for chart in charts if chart is not None], constant


def _flat(points: Points) -> float | None:
    """The last value of a curve that stays within 2 % of its largest; None of any other."""
    values = [value for _, value in points]
    return values[-1] if max(values) - min(values) <= 0.02 * max(map(abs, values)) else None


def _ranked(values: Sequence[float]) -> Points:
    return [(number, value) for number, value in enumerate(values, 1)]


def _spectra(spectra: Sequence[Spectra]) -> list[Chart]:
    kinds = {
        "Bases": [entry.bases for entry in spectra],
        "Codes": [entry.codes for entry in spectra],
        "Adapters, median of experts": [entry.adapters for entry in spectra],
    }
    names = [describe(entry.bank) for entry in spectra]
    charts = [
        curve_chart(
            title, [Curve(name, _ranked(v)) for name, v in zip(names, values, strict=True)], "rank", logarithmic=True
        )
        for title, values in kinds.items()
    ]
    return [chart for chart in charts if chart is not None]


def _popularities(banks: Sequence[BankReport]) -> dict[str, list[float]]:
    """The share of each basis in the experts' mixtures, the most popular first, by bank."""
    popularities: dict[str, list[float]] = {}
    for bank in banks:
        popularity = bank.metrics.get("popularity")
        if isinstance(popularity, list) and popularity:
            popularities[describe(bank)] = sorted(map(float, popularity), reverse=True)
    return popularities


def _popularity(banks: Sequence[BankReport]) -> Chart | None:
    curves = {name: _ranked(shares) for name, shares in _popularities(banks).items()}
    summary = f"median of {len(curves)} banks, and their range"
    return curve_chart("Popularity of the bases", _curves(curves, summary), "basis, most popular first", from_zero=True)


def _phases(report: Report) -> list[dict[str, Any]]:
    """Seconds and share of each phase, over all banks and all that is coded."""
    worked = sum(part.seconds for part in (*report.banks, *report.coded))
    seconds = {"measuring and planning": report.seconds - worked} if report.seconds > worked else {}
    for part in report.coded:
        seconds[f"coding {part.family}"] = seconds.get(f"coding {part.family}", 0.0) + part.seconds
    for bank in report.banks:
        phases = bank.metrics.get("phases")
        for phase, spent in phases.items() if isinstance(phases, dict) else ():
            seconds[phase] = seconds.get(phase, 0.0) + float(spent)
    total = sum(seconds.values()) or 1.0
    return [{"name": name, "seconds": spent, "share": spent / total} for name, spent in seconds.items()]


def _fit(bank: BankReport) -> dict[str, Any]:
    taken = bank.steps.get("step")
    return {
        "name": describe(bank),
        "shape": bank.shape,
        "error": bank.error,
        "steps": "" if not taken else int(taken[-1]),
        "outcome": bank.outcome.replace("_", " "),
        "seconds": bank.seconds,
        "fallbacks": _count(bank, "num_fallbacks"),
        "returns": _count(bank, "num_restarts") if "num_restarts" in bank.metrics else _count(bank, "num_rejected"),
    }
