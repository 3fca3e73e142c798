"""Experts in the format of compressed-tensors: 4 or 8 bits chosen for each layer, and one layer rounded and packed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from globe.checkpoint.compressed_tensors import WIDTHS, Scheme, group_size, layer_bytes, quantization_section
from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.checkpoint.layout import ExpertLayer, source_names
from globe.checkpoint.packed import packed_matrix
from globe.checkpoint.report import CodedReport
from globe.errors import SettingsError, UnsupportedModelError
from globe.experts.coding import damped
from globe.experts.metric import LayerStatistics
from globe.experts.rounding import RoundingProblem, rounding_problem
from globe.machine.memory import FITS_EXHAUSTED, explained_exhaustion
from globe.measure.sensitivity import Sensitivities
from globe.plan.budget import Bits
from globe.plan.knapsack import choose
from globe.quant.trellis import MAX_WIDTH
from globe.run.job import Job
from globe.run.outline import Outline
from globe.terms import FAMILIES, Family


@dataclasses.dataclass(frozen=True)
class RoundingPlan:
    """How bits are shared out among layers: a server fuses all experts of one, and wants one width for them."""

    widths: Mapping[int, int]
    """Bits of each layer."""
    num_bytes: int
    """Of all that is stored of the experts."""
    predicted_kl: float | None
    """The divergence from the original to second order, in nats per token; None where sensitivities are unknown."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RoundingPlan:
        """The inverse of `dataclasses.asdict`, through JSON."""
        widths = {int(layer): bits for layer, bits in record["widths"].items()}
        return cls(widths, record["num_bytes"], record["predicted_kl"])


def plan_rounding(
    job: Job, statistics: Mapping[int, LayerStatistics] | None, sensitivities: Sensitivities, measured: bool = True
) -> RoundingPlan:
    """The widths that lose least within the budget of bits; raises `SettingsError` where 4 bits everywhere exceed it.

    Without `measured` the sensitivities are made up, and predict nothing.
    """
    check_packable(job)
    layers = _layers(job)
    importance = damped(sensitivities)
    costs, lost = ([[0.0] * len(WIDTHS) for _ in layers] for _ in range(2))
    with explained_exhaustion("planning", FITS_EXHAUSTED):
        for place, layer in enumerate(layers):
            for family in FAMILIES:
                problem = _problem(job, statistics, layer, family)
                for option, bits in enumerate(WIDTHS):
                    losses = problem.losses(bits)
                    costs[place][option] += float((importance[layer.index, family] * losses).sum())
                    lost[place][option] += float((sensitivities[layer.index, family] * losses).sum())
    sizes = [[layer_bytes(layer, bits) for bits in WIDTHS] for layer in layers]
    assert isinstance(job.config.budget, Bits)
    chosen = choose(costs, sizes, job.config.budget.num_bytes(job.original_parameters()))
    widths = {layer.index: WIDTHS[option] for layer, option in zip(layers, chosen, strict=True)}
    num_bytes = sum(size[option] for size, option in zip(sizes, chosen, strict=True))
    predicted = math.fsum(each[option] for each, option in zip(lost, chosen, strict=True))
    return RoundingPlan(widths, num_bytes, predicted if measured else None)


def round_layer(
    job: Job, plan: RoundingPlan, statistics: Mapping[int, LayerStatistics] | None, index: int
) -> Iterator[tuple[dict[str, Tensor], CodedReport]]:
    """Family after family of a layer: the tensors that are stored, and how it went."""
    layer, bits = job.layers[index], plan.widths[index]
    for family in FAMILIES:
        began = time.monotonic()
        problem = _problem(job, statistics, layer, family)
        rounded = problem.round(bits)
        parts = zip(source_names(layer, family), rounded.numbers, rounded.scales, strict=True)
        tensors: dict[str, Tensor] = {}
        for name, numbers, scales in parts:
            tensors |= packed_matrix(name, numbers.T, scales.T, bits)
        missed = (problem.X - rounded.decode()).double().square().sum((1, 2))
        energies = problem.X.double().square().sum((1, 2))
        E, N, _ = problem.X.shape
        report = CodedReport(
            index,
            family,
            problem.X.numel(),
            sum(tensor.nbytes for tensor in tensors.values()),
            0,
            0,
            time.monotonic() - began,
            float((missed.sum() / energies.sum()).sqrt()) if energies.sum() > 0 else 0.0,
            torch.where(missed > 0, (missed / energies).sqrt(), 0.0).tolist(),
            [float(bits)] * E,
            [E * N * (width == 2 * bits) for width in range(MAX_WIDTH + 1)],
        )
        yield tensors, report


def section(job: Job, plan: RoundingPlan) -> dict[str, Any]:
    """What config.json says of it."""
    schemes: defaultdict[Scheme, list[str]] = defaultdict(list)
    for index, bits in plan.widths.items():
        layer = job.layers[index]
        schemes[bits, group_size(layer)].append(layer.prefix)
    return quantization_section(schemes)


def check_packable(outline: Outline) -> None:
    """Raise `UnsupportedModelError` for experts that do not fit the format, `SettingsError` for too small a budget."""
    for layer in _layers(outline):
        if layer.layout == "fused":
            raise UnsupportedModelError(
                f"{layer.prefix} holds all experts in one tensor, and compressed-tensors a matrix for each: "
                "leave format out"
            )
        if layer.num_unused:
            raise UnsupportedModelError(
                f"{layer.prefix} has {layer.num_unused} matrices that no expert uses, which servers of this format "
                "would miss: leave format out"
            )
        if group_size(layer) % 8:
            raise UnsupportedModelError(
                f"{layer.prefix} has experts of {layer.intermediate_size} x {layer.hidden_size}, which do not divide "
                "into groups of 8 at least, as compressed-tensors packs them: leave format out"
            )
    budget = outline.config.budget
    if isinstance(budget, Bits) and budget.per_weight < (least := outline.least_packed_bits()):
        raise SettingsError(
            f"bits {budget.per_weight:g} is out of reach: with their scales, {WIDTHS[0]} bits take {least:g} here; "
            "choose more, or leave bits out"
        )


def _layers(outline: Outline) -> list[ExpertLayer]:
    """Those that are rounded, in order."""
    return [outline.layers[index] for scope in outline.scopes for index in scope.layers]


def _problem(
    job: Job, statistics: Mapping[int, LayerStatistics] | None, layer: ExpertLayer, family: Family
) -> RoundingProblem:
    own, dtype = None if statistics is None else statistics[layer.index], TORCH_DTYPES[layer.dtype]
    scale_dtype = dtype if dtype.itemsize == torch.bfloat16.itemsize else torch.bfloat16
    return rounding_problem(job.checkpoint, layer, family, own, scale_dtype)
