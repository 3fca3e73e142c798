"""Experts in few bits: the budget shared out among all rows of the model, and one layer coded and written."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.report import CodedReport
from globe.errors import SettingsError
from globe.experts.coding import CodingProblem, coding_problem, damped, form_of
from globe.experts.metric import LayerStatistics
from globe.machine.memory import FITS_EXHAUSTED, explained_exhaustion
from globe.measure.runnable import find_place
from globe.measure.sensitivity import Sensitivities, measure_sensitivities, random_windows
from globe.model.coded_spec import CodedSpec, spec_of
from globe.model.loading import load
from globe.quant.banked import BankedExperts, CodedBank
from globe.quant.side import side_bytes
from globe.quant.water_fill import Rows, water_fill
from globe.run.job import Job
from globe.terms import Family

MOST_WINDOWS = 64
"""On which sensitivities are measured: single experts want more tokens than whole banks; measured, see docs/log.md."""


@dataclasses.dataclass(frozen=True)
class CodingPlan:
    """How bits are shared out: a row gets all those whose gain reaches one multiplier."""

    multipliers: tuple[int, int, int]
    """Log of the multiplier, in the unit of `globe.quant.water_fill`: for the rows as they are, at which banks are
    chosen; for what banks leave of them, at which feedback is rehearsed; for the rows as feedback makes them."""
    num_bases: Mapping[tuple[int, Family], int]
    """Bases of the bank of each layer and family; 0: none pays."""
    importance: Mapping[tuple[int, Family], Tensor]
    """Damped sensitivities of the experts (E,), by layer and family."""
    num_bytes: int
    """Of all that is stored of coded families."""


def plan_to_json(plan: CodingPlan) -> dict[str, Any]:
    """The plan as a record holds it."""
    return {
        "multipliers": plan.multipliers,
        "num_bases": {f"{layer} {family}": count for (layer, family), count in plan.num_bases.items()},
        "importance": {f"{layer} {family}": each.tolist() for (layer, family), each in plan.importance.items()},
        "num_bytes": plan.num_bytes,
    }


def plan_from_json(record: Mapping[str, Any]) -> CodingPlan:
    """The inverse."""

    def places(entries: Mapping[str, Any]) -> Iterator[tuple[tuple[int, Family], Any]]:
        for key, entry in entries.items():
            layer, family = key.split()
            yield (int(layer), cast(Family, family)), entry

    importance = {place: torch.tensor(each, dtype=torch.float32) for place, each in places(record["importance"])}
    first, second, third = record["multipliers"]
    return CodingPlan((first, second, third), dict(places(record["num_bases"])), importance, record["num_bytes"])


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
    windows = windows[:: math.ceil(len(windows) / MOST_WINDOWS)]
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
        problems = {key: functools.partial(_problem, job, statistics, importance, *key) for key in importance}
        first = second = water_fill([problem().rows() for problem in problems.values()], budget).multiplier
        left, num_bases, in_banks = list[Rows](), dict[tuple[int, Family], int](), 0
        for key, problem in problems.items():
            whole = problem()
            bank = whole.bank(first)
            num_bases[key] = 0 if bank is None else bank.codes.shape[1]
            in_banks += 0 if bank is None else bank.num_bytes
            left.append(whole.without(bank).rows())
        if in_banks:
            second = water_fill(left, max(0, budget - in_banks)).multiplier
        rows = (_without_bank(problem(), first, num_bases[key])[1] for key, problem in problems.items())
        filled = water_fill([rest.rehearsed(second).rows() for rest in rows], max(0, budget - in_banks))
    return CodingPlan((first, second, filled.multiplier), num_bases, importance, filled.num_bytes + side + in_banks)


def _without_bank(whole: CodingProblem, multiplier: int, num_bases: int) -> tuple[CodedBank | None, CodingProblem]:
    bank = whole.bank(multiplier, num_bases)
    return bank, whole.without(bank)


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
) -> Iterator[tuple[CodedSpec, BankedExperts, CodedReport]]:
    """Family after family of a layer: what config.json says of it, what is stored, and how it went."""
    for family in job.config.families:
        began = time.monotonic()
        whole = _problem(job, statistics, plan.importance, index, family)
        bank, problem = _without_bank(whole, plan.multipliers[0], plan.num_bases[index, family])
        rest, decoded = problem.rehearsed(plan.multipliers[1]).code(plan.multipliers[2])
        coded = BankedExperts(rest, bank)
        missed, energies = (x.double().square().sum((1, 2)) for x in (problem.X - decoded, whole.X))
        widths = rest.side.widths()
        report = CodedReport(
            index,
            family,
            whole.X.numel(),
            coded.num_bytes,
            0 if bank is None else bank.codes.shape[1],
            0 if bank is None else bank.num_bytes,
            time.monotonic() - began,
            float((missed.sum() / energies.sum()).sqrt()) if energies.sum() > 0 else 0.0,
            torch.where(missed > 0, (missed / energies).sqrt(), 0.0).tolist(),
            [float(f"{bits:.4g}") for bits in widths.double().mean(1).tolist()],
            torch.bincount(widths.flatten().int(), minlength=9).tolist(),
        )
        yield spec_of(index, family, coded), coded, report


def _problem(
    job: Job,
    statistics: Mapping[int, LayerStatistics] | None,
    importance: Mapping[tuple[int, Family], Tensor],
    index: int,
    family: Family,
) -> CodingProblem:
    own = None if statistics is None else statistics[index]
    return coding_problem(job.checkpoint, job.layers[index], family, own, importance[index, family])
