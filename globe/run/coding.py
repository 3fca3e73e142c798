"""Experts in few bits: the budget shared out among all rows of the model, and one layer coded and written."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.report import CodedReport
from globe.errors import SettingsError
from globe.experts.coding import CodingProblem, coding_problem, damped, form_of
from globe.experts.metric import LayerStatistics
from globe.machine.memory import FITS_EXHAUSTED, explained_exhaustion
from globe.measure.runnable import find_place
from globe.measure.sensitivity import NUM_WINDOWS, Sensitivities, measure_sensitivities, random_windows
from globe.model.coded_spec import CodedSpec
from globe.model.loading import load
from globe.quant.coded import CodedExperts
from globe.quant.side import side_bytes
from globe.quant.water_fill import water_fill
from globe.run.job import Job
from globe.terms import Family


@dataclasses.dataclass(frozen=True)
class CodingPlan:
    """How bits are shared out: a row gets all those whose gain reaches one multiplier."""

    first_multiplier: int
    """Log of the multiplier for the rows as they are, at which feedback is rehearsed; in the unit of
    `globe.quant.water_fill`."""
    multiplier: int
    """Log of the multiplier for the rows as feedback makes them."""
    importance: Mapping[tuple[int, Family], Tensor]
    """Damped sensitivities of the experts (E,), by layer and family."""
    num_bytes: int
    """Of all that is stored of coded families."""


def plan_to_json(plan: CodingPlan) -> dict[str, Any]:
    """The plan as a record holds it."""
    importance = {f"{layer} {family}": each.tolist() for (layer, family), each in plan.importance.items()}
    return {
        "first_multiplier": plan.first_multiplier,
        "multiplier": plan.multiplier,
        "importance": importance,
        "num_bytes": plan.num_bytes,
    }


def plan_from_json(record: Mapping[str, Any]) -> CodingPlan:
    """The inverse."""
    importance = dict[tuple[int, Family], Tensor]()
    for key, each in record["importance"].items():
        layer, family = key.split()
        importance[int(layer), family] = torch.tensor(each, dtype=torch.float32)
    return CodingPlan(record["first_multiplier"], record["multiplier"], importance, record["num_bytes"])


def measured_sensitivities(job: Job, windows: Tensor | None) -> tuple[Sensitivities, str | None]:
    """Of all experts to be coded, on some of the token windows or on random tokens; equal ones, and the reason, where
    the model cannot be run."""
    layers = {index for scope in job.scopes for index in scope.layers}
    equal: Sensitivities = {
        (index, family): torch.ones(job.layers[index].num_experts) for index in layers for family in job.config.families
    }
    if job.config.allocation == "uniform":
        return equal, "that is asked for"
    place = find_place(job.checkpoint, job.config.device, torch.float32.itemsize)
    if place.device is None:
        return equal, place.obstacle
    model = load(job.checkpoint.fetched(), place.device, torch.float32)
    windows = random_windows(model, job.config.seed) if windows is None else windows
    windows = windows[:: math.ceil(len(windows) / NUM_WINDOWS)]
    found = measure_sensitivities(model, windows, layers, job.config.seed)
    return {key: found[key] for key in equal}, None


def plan_coding(job: Job, statistics: Mapping[int, LayerStatistics] | None, sensitivities: Sensitivities) -> CodingPlan:
    """The least multiplier at which everything that is stored of the coded families fits the budget of bits."""
    assert job.config.bits is not None
    importance = damped(sensitivities)
    shapes = {key: job.layers[key[0]] for key in importance}
    original = sum(layer.num_experts * layer.intermediate_size * layer.hidden_size for layer in shapes.values())
    side = sum(_side_bytes(layer, family) for (_, family), layer in shapes.items())
    budget = max(0, int(job.config.bits * original / 8) - side)
    with explained_exhaustion("planning", FITS_EXHAUSTED):
        problems = (_problem(job, statistics, importance, *key) for key in importance)
        first = water_fill([problem.rows() for problem in problems], budget).multiplier
        problems = (_problem(job, statistics, importance, *key) for key in importance)
        filled = water_fill([problem.rehearsed(first).rows() for problem in problems], budget)
    return CodingPlan(first, filled.multiplier, importance, filled.num_bytes + side)


def check_reach(job: Job) -> None:
    """Raise `SettingsError` where widths and scales alone take all the bits that are asked for."""
    places = [job.layers[index] for scope in job.scopes for index in scope.layers]
    side = sum(_side_bytes(layer, family) for layer in places for family in job.config.families)
    least = 8 * side / job.original_parameters()
    if job.config.bits is not None and job.config.bits < least:
        raise SettingsError(
            f"bits {job.config.bits:g} is out of reach: widths and scales of experts this small take {least:.2f} bits "
            "a weight; choose more, or keep"
        )


def _side_bytes(layer: ExpertLayer, family: Family) -> int:
    num_inputs, num_outputs = layer.hidden_size, layer.intermediate_size
    if family == "down":
        num_inputs, num_outputs = num_outputs, num_inputs
    return side_bytes(layer.num_experts, num_inputs, form_of(family, num_outputs) == "shared")


def code_layer(
    job: Job, plan: CodingPlan, statistics: Mapping[int, LayerStatistics] | None, index: int
) -> Iterator[tuple[CodedSpec, CodedExperts, CodedReport]]:
    """Family after family of a layer: what config.json says of it, what is stored, and how it went."""
    for family in job.config.families:
        began = time.monotonic()
        problem = _problem(job, statistics, plan.importance, index, family)
        coded, decoded = problem.rehearsed(plan.first_multiplier).code(plan.multiplier)
        missed, energies = (x.double().square().sum((1, 2)) for x in (problem.X - decoded, problem.X))
        widths = coded.side.widths()
        report = CodedReport(
            index,
            family,
            problem.X.numel(),
            coded.num_bytes,
            time.monotonic() - began,
            float((missed.sum() / energies.sum()).sqrt()) if energies.sum() > 0 else 0.0,
            torch.where(missed > 0, (missed / energies).sqrt(), 0.0).tolist(),
            [float(f"{bits:.4g}") for bits in widths.double().mean(1).tolist()],
            torch.bincount(widths.flatten().int(), minlength=9).tolist(),
        )
        yield CodedSpec(index, family, coded.payload.numel(), shared=problem.form == "shared"), coded, report


def _problem(
    job: Job,
    statistics: Mapping[int, LayerStatistics] | None,
    importance: Mapping[tuple[int, Family], Tensor],
    index: int,
    family: Family,
) -> CodingProblem:
    own = None if statistics is None else statistics[index]
    return coding_problem(job.checkpoint, job.layers[index], family, own, importance[index, family])
