"""Experts in few bits: the budget shared out among all rows of the model, and one layer coded and written."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import ChainMap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from globe.bank_shape import sides
from globe.checkpoint.kept import keep_tensors, kept_tensors
from globe.checkpoint.report import CodedReport
from globe.experts.coding import CodingProblem, Rehearsed, damped
from globe.experts.decoded import decoded
from globe.experts.family import ExpertFamily, joined
from globe.experts.metric import LayerStatistics
from globe.experts.on_disk import Stack
from globe.machine.memory import FITS_EXHAUSTED, explained_exhaustion
from globe.measure.compensate import Correction
from globe.measure.placed import placed_sensitivities
from globe.measure.runnable import find_place, has_room
from globe.measure.runs import MOST_WINDOWS, wants_sensitivities
from globe.measure.sensitivity import Sensitivities
from globe.model.coded_spec import CodedSpec, spec_of
from globe.plan.budget import Bits
from globe.quant.banked import BankedExperts, CodedBank
from globe.quant.coded import CodedExperts, Rehearsal
from globe.quant.trellis import MAX_WIDTH
from globe.quant.water_fill import Rows, water_fill
from globe.run.job import Job
from globe.run.outline import out_of_reach
from globe.run.ranks import ALONE, Ranks
from globe.terms import Family

_Key = tuple[int, Family]
_FamilyOf = Callable[[int, Family, Tensor | None], ExpertFamily]


@dataclasses.dataclass(frozen=True)
class CodingPlan:
    """How bits are shared out: a row gets all those whose gain reaches one multiplier."""

    multipliers: tuple[int, int, int]
    """Log of the multiplier, in the unit of `globe.quant.water_fill`: for the rows as they are, at which banks are
    chosen; for what banks leave of them, at which feedback is rehearsed; for the rows as feedback makes them."""
    num_bases: Mapping[tuple[int, Family], int]
    """Bases of the bank of each layer and family; 0: none pays."""
    num_bytes: int
    """Of all that is stored of coded families."""
    predicted_kl: float | None
    """The divergence from the original to second order, in nats per token; None where sensitivities are unknown."""
    rehearsals: Path | None = None
    """The folder that keeps what rehearsals found, to be used again, if any does."""


def plan_to_json(plan: CodingPlan) -> dict[str, Any]:
    """The plan as a record holds it."""
    return {
        "multipliers": plan.multipliers,
        "num_bases": {f"{layer} {family}": count for (layer, family), count in plan.num_bases.items()},
        "num_bytes": plan.num_bytes,
        "predicted_kl": plan.predicted_kl,
    }


def plan_from_json(record: Mapping[str, Any], rehearsals: Path | None = None) -> CodingPlan:
    """The inverse, with the folder that keeps rehearsals."""
    num_bases: dict[tuple[int, Family], int] = {}
    for key, count in record["num_bases"].items():
        layer, family = key.split()
        num_bases[int(layer), cast(Family, family)] = count
    first, second, third = record["multipliers"]
    return CodingPlan((first, second, third), num_bases, record["num_bytes"], record["predicted_kl"], rehearsals)


def measured_sensitivities(
    job: Job, windows: Tensor | None, folder: Path | None = None, ranks: Ranks = ALONE
) -> tuple[Sensitivities, str | None]:
    """Of all experts to be coded, on some of the token windows or on random tokens; equal ones, and the reason, where
    the model cannot be run. One that does not fit into memory keeps files in the folder meanwhile."""
    layers = {index for scope in job.scopes for index in scope.layers}
    equal: Sensitivities = {
        (index, family): torch.ones(job.layers[index].num_experts, sides(job.layers[index], family)[1])
        for index in layers
        for family in job.config.families
    }
    if not wants_sensitivities(job.config):
        return equal, "that is asked for"
    place = find_place(job.checkpoint, job.config.device, torch.float32.itemsize)
    if place.device is None:
        return equal, place.obstacle
    if not has_room(job.checkpoint, place, ranks.num_here):
        ranks = ALONE
    settings = (windows, layers, MOST_WINDOWS, job.config.seed, folder)
    found = ChainMap(*ranks.together(placed_sensitivities, place, job.checkpoint, *settings))
    return {key: found[key] for key in equal}, None


def plan_coding(
    job: Job,
    statistics: Mapping[int, LayerStatistics] | None,
    sensitivities: Sensitivities,
    measured: bool = True,
    ranks: Ranks = ALONE,
    folder: Path | None = None,
) -> CodingPlan:
    """The least multiplier at which everything that is stored of the coded families fits the budget of bits.

    Without `measured` the sensitivities are made up, and predict nothing. The `folder` keeps what rehearsals find.

    Raises `SettingsError` where widths and scales alone do not.
    """
    assert isinstance(job.config.budget, Bits)
    importance = damped(sensitivities)
    sizes = (job.layers[index] for index, _ in importance)
    original = sum(layer.num_experts * layer.intermediate_size * layer.hidden_size for layer in sizes)
    asked, budget = job.config.budget, job.config.budget.num_bytes(original)

    def payload(other_bytes: int) -> int:
        if other_bytes > budget:
            raise out_of_reach(asked, 8 * other_bytes / original)
        return budget - other_bytes

    keys, family_of = [*importance], functools.partial(_family, job, statistics, importance)
    rows_and_side = functools.partial(_rows_and_side, family_of)
    unknown = [None] * len(keys)
    rows, sides, squares = zip(*ranks.map(rows_and_side, keys, unknown, unknown), strict=True)
    first = second = water_fill(rows, payload(sum(sides))).multiplier
    banks = ranks.map(functools.partial(_bank, family_of, first), keys, squares)
    if in_banks := sum(bank.num_bytes for bank in banks if bank is not None):
        rows, sides, _ = zip(*ranks.map(rows_and_side, keys, squares, banks), strict=True)
        second = water_fill(rows, payload(sum(sides) + in_banks)).multiplier
    costs = [sensitivities[key] for key in keys]
    rehearsals = ranks.map(functools.partial(_rehearsed, family_of, second, folder), keys, squares, banks, costs)
    filled = water_fill([each for each, _ in rehearsals], payload(sum(sides) + in_banks))
    lost = sum(each.loss(stake, filled.multiplier) for each, stake in rehearsals)
    num_bases = {key: 0 if bank is None else bank.codes.shape[1] for key, bank in zip(keys, banks, strict=True)}
    multipliers, num_bytes = (first, second, filled.multiplier), filled.num_bytes + sum(sides) + in_banks
    return CodingPlan(multipliers, num_bases, num_bytes, lost if measured else None, folder)


_exhausted = explained_exhaustion("planning", FITS_EXHAUSTED)


@_exhausted
def _rows_and_side(
    family_of: _FamilyOf, key: _Key, squares: Tensor | None, bank: CodedBank | None
) -> tuple[Rows, int, Tensor]:
    """What of a family is to be shared out when the bank's mixtures are taken from it, the bytes of what is stored
    beside that, and the mean squares of its outputs."""
    left = family_of(*key, squares).without(bank)
    rows, side_bytes = zip(*left.by_part(lambda _, problem: (problem.rows(), problem.side_bytes)), strict=True)
    return joined(rows), sum(side_bytes), left.mean_squares


@_exhausted
def _bank(family_of: _FamilyOf, multiplier: int, key: _Key, squares: Tensor) -> CodedBank | None:
    return family_of(*key, squares).find_bank(multiplier)


@_exhausted
def _rehearsed(
    family_of: _FamilyOf,
    multiplier: int,
    folder: Path | None,
    key: _Key,
    squares: Tensor,
    bank: CodedBank | None,
    sensitivities: Tensor,
) -> tuple[Rows, Tensor]:
    """What is to be shared out in the end, and what leaving it out costs."""

    def rehearse(part: slice, problem: CodingProblem) -> tuple[Rows, Tensor, Rehearsal]:
        rehearsed = problem.rehearsed(multiplier)
        return rehearsed.rows(), rehearsed.stakes(sensitivities[part]), rehearsed.expected

    rows, stakes, expected = zip(*family_of(*key, squares).without(bank).by_part(rehearse), strict=True)
    if folder is not None:
        keep_tensors(_rehearsal_file(folder, *key), {**vars(Rehearsal.cat(expected)), "squares": squares})
    return joined(rows), torch.cat(stakes)


def _rehearsal_file(folder: Path, index: int, family: Family) -> Path:
    return folder / f"rehearsal-{index}-{family}.safetensors"


@dataclasses.dataclass(frozen=True)
class CodedFamily:
    """A family of a layer, coded."""

    spec: CodedSpec
    """What config.json says of it."""
    experts: BankedExperts
    """What is stored."""
    report: CodedReport
    """How it went."""

    def matrices(self, dtype: torch.dtype, scratch: Path | None) -> Stack:
        """What it decodes to, (E, P, D), rounded to a dtype; where it is large, in the folder `scratch`."""
        return decoded(self.spec.family, self.experts, dtype, scratch)


def code_family(
    job: Job,
    plan: CodingPlan,
    statistics: Mapping[int, LayerStatistics] | None,
    sensitivities: Sensitivities,
    index: int,
    family: Family,
    correction: Correction | None = None,
) -> CodedFamily:
    """Code a family of a layer, with a correction in place of what it is."""
    began = time.monotonic()
    kept = None if plan.rehearsals is None else kept_tensors(_rehearsal_file(plan.rehearsals, index, family))
    squares = None if kept is None else kept.pop("squares")
    expected = None if kept is None else Rehearsal(**kept)
    whole = _family(job, statistics, damped(sensitivities), index, family, squares)
    bank = whole.find_bank(plan.multipliers[0], plan.num_bases[index, family])

    def code(part: slice, problem: CodingProblem) -> tuple[CodedExperts, Tensor, Tensor]:
        """What is stored of a part, and by expert the squares of its errors and of what it was."""
        added = None if correction is None else correction.down[part].float()
        rehearsed = problem.rehearsed(plan.multipliers[1]) if expected is None else Rehearsed(problem, expected[part])
        coded, decoded = rehearsed.code(plan.multipliers[2], added)
        return coded, _energies(decoded.sub_(problem.X)), _energies(whole.read(part))

    parts, errors, energies = zip(*whole.without(bank).by_part(code), strict=True)
    rest, missed, energy = CodedExperts.cat(parts), torch.cat(errors), torch.cat(energies)
    coded, widths = BankedExperts(rest, bank), rest.side.widths()
    report = CodedReport(
        index,
        family,
        math.prod(widths.shape) * rest.num_outputs,
        coded.num_bytes,
        0 if bank is None else bank.codes.shape[1],
        0 if bank is None else bank.num_bytes,
        time.monotonic() - began,
        float((missed.sum() / energy.sum()).sqrt()) if energy.sum() > 0 else 0.0,
        torch.where(missed > 0, (missed / energy).sqrt(), 0.0).tolist(),
        [float(f"{bits:.4g}") for bits in (widths.double().mean(1) / 2).tolist()],
        torch.bincount(widths.flatten().int(), minlength=MAX_WIDTH + 1).tolist(),
        None if correction is None else correction.share,
    )
    return CodedFamily(spec_of(index, family, coded), coded, report)


def _energies(X: Tensor) -> Tensor:
    return torch.stack([x.double().square().sum() for x in X])


def _family(
    job: Job,
    statistics: Mapping[int, LayerStatistics] | None,
    importance: Mapping[tuple[int, Family], Tensor],
    index: int,
    family: Family,
    squares: Tensor | None = None,
) -> ExpertFamily:
    """`squares` are its mean squares, where they are known."""
    own, layer, worth = None if statistics is None else statistics[index], job.layers[index], importance[index, family]
    return ExpertFamily(job.checkpoint, layer, family, own, worth, known_squares=squares)
