"""The expert matrices of a bank as one normalised stack, and the bank's factors as they are stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from globe.bank.activations import activate
from globe.bank.adapters import refit_adapters
from globe.bank.factors import Factors, compose, mix
from globe.bank.objective import InputMetric, expert_chunks, missed_and_sizes
from globe.bank.rounding import Precision, decoded, encode, encode_with_feedback
from globe.checkpoint.layout import ExpertLayer, Family
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.stacks import read_family
from globe.errors import SettingsError
from globe.metric import LayerStatistics, input_metric, row_scales
from globe.plan import BankPlan


@dataclasses.dataclass(frozen=True)
class Group:
    """The experts of one family in one layer, within a stack."""

    layer: int
    family: Family
    part: slice
    """Their places along E."""
    sigma: float
    """Root mean square of their weights, by which the stack is divided unless it is 0."""
    row_scales: Tensor | None = None
    """√s (E, P), by which a calibrated stack's rows are multiplied then."""

    def restore(self, rows: Tensor, part: slice) -> Tensor:
        """Matrices (e, P, K) of the experts `part` of the group in the units of the weights."""
        return rows * self.sigma if self.row_scales is None else rows * (self.sigma / self.row_scales[part, :, None])


@dataclasses.dataclass(frozen=True)
class ExpertStack:
    """All matrices that share a bank."""

    weights: Tensor
    """W / σ, (E, P, D), float32. Calibrated: S^{1/2} W / σ."""
    groups: tuple[Group, ...]
    metric: InputMetric | None = None
    """C of the experts, when calibrated."""


@dataclasses.dataclass(frozen=True)
class StoredFactors:
    """Factors in the precision they are stored in, and what that costs."""

    adapters: dict[tuple[int, Family], Tensor]
    """A (E, P, R) by layer and family, in the units of the weights; in few bits, rows are encoded."""
    codes: dict[tuple[int, Family], Tensor]
    """a (E, M) by layer and family, likewise."""
    bases: Tensor
    """B (M, R, D), likewise."""
    errors: dict[tuple[int, Family], float]
    """‖W − What‖_F / ‖W‖_F of each layer and family, after rounding."""
    expert_errors: dict[tuple[int, Family], list[float]]
    """The same of every expert."""


def read_stack(
    checkpoint: Checkpoint,
    layers: Mapping[int, ExpertLayer],
    bank: BankPlan,
    statistics: Mapping[int, LayerStatistics] | None = None,
) -> ExpertStack:
    """Read a bank's experts: layer after layer, family after family, each divided by its root mean square.

    With `statistics` of the layers the stack is in the calibrated metric. Raises `CheckpointError` naming the tensor
    that holds NaN or Inf.
    """
    weights = torch.empty(bank.num_matrices, bank.rows, bank.columns)
    groups: list[Group] = []
    start = 0
    for index in bank.layers:
        for family in bank.families:
            part = slice(start, start + layers[index].num_experts)
            weights[part] = read_family(checkpoint, layers[index], family)
            sigma = _root_mean_square(weights[part])
            if sigma > 0:
                weights[part] /= sigma
            groups.append(Group(index, family, part, sigma))
            start = part.stop
    stack = ExpertStack(weights, tuple(groups))
    return stack if statistics is None else _calibrated(stack, statistics)


def _root_mean_square(experts: Tensor) -> float:
    """In float64, an expert at a time: the squares of weights such as 1e30 or 1e-30 leave the range of float32."""
    return math.sqrt(sum(float(expert.double().square().sum()) for expert in experts) / experts.numel())


def _calibrated(stack: ExpertStack, statistics: Mapping[int, LayerStatistics]) -> ExpertStack:
    """The stack with its rows scaled, in place, and with the second moments of its layers."""
    layers = list(dict.fromkeys(group.layer for group in stack.groups))
    groups: list[Group] = []
    second_moment_of: list[int | None] = []
    for index in layers:
        own = [group for group in stack.groups if group.layer == index]
        scales = row_scales(statistics[index], {group.family: group.sigma for group in own})
        for group in own:
            stack.weights[group.part] *= scales[group.family][:, :, None]
            groups.append(dataclasses.replace(group, row_scales=scales[group.family]))
            place = None if group.family == "down" else layers.index(index)
            second_moment_of += [place] * len(scales[group.family])
    second_moments = torch.stack([input_metric(statistics[index]) for index in layers])
    return ExpertStack(stack.weights, tuple(groups), InputMetric(second_moments, tuple(second_moment_of)))


@torch.no_grad()
def to_storage(
    stack: ExpertStack,
    factors: Factors,
    dtype: torch.dtype,
    precision: Precision = Precision(),  # noqa: B008
    lambda_a: float = 1e-6,
) -> StoredFactors:
    """Round codes and bases, refit the adapters to what was rounded, fold σ in and round them too.

    Factors without bits in `precision` are rounded to `dtype`. The adapters are ill-conditioned enough to amplify the
    bank's rounding; refitted, in the metric of the fit, they make up for most of it. Rounded to few bits, their later
    columns make up for the error of the earlier ones. The errors are in plain Frobenius norms; that of zeros, whose
    factors are exact, is 0. Raises `SettingsError` for adapters that leave the range of `dtype`.
    """
    codes, wide_codes = _stored(factors.codes, precision.codes, dtype)
    bases, wide_bases = _stored(factors.bases, precision.bases, dtype)
    stored = StoredFactors({}, {}, bases, {}, {})
    for group in stack.groups:
        key: tuple[int, Family] = (group.layer, group.family)
        adapters, errors, missed, energy = list[Tensor](), list[float](), 0.0, 0.0
        weights, own_codes = stack.weights[group.part], wide_codes[group.part]
        for part in expert_chunks(weights):
            features = activate(mix(own_codes[part], wide_bases), factors.activation)
            place = slice(group.part.start + part.start, group.part.start + part.stop)
            weighed = features if stack.metric is None else stack.metric.weigh(features, place)
            exact, _ = refit_adapters(weights[part], features, lambda_a=lambda_a, weighed=weighed)
            exact = group.restore(exact, part)
            if precision.adapters is None:
                adapters.append(exact.to(dtype))
            else:
                adapters.append(encode_with_feedback(exact, weighed @ features.mT, precision.adapters))
            approximation = decoded(adapters[-1], factors.bases.shape[1], precision.adapters).to(features) @ features
            own_missed, sizes = missed_and_sizes(group.restore(weights[part], part), approximation)
            if not bool(own_missed.isfinite().all()):
                raise SettingsError(
                    f"the adapters of layer {group.layer} {group.family} leave the range of "
                    f"{str(adapters[-1].dtype).removeprefix('torch.')}: choose --factor-dtype bfloat16 or float32"
                )
            errors += torch.where(own_missed == 0, 0.0, own_missed / sizes).tolist()
            missed, energy = missed + float(own_missed.square().sum()), energy + float(sizes.square().sum())
        stored.adapters[key], stored.codes[key] = (
            torch.cat(adapters),
            codes[group.part].clone(memory_format=torch.contiguous_format),
        )
        stored.expert_errors[key] = errors
        stored.errors[key] = math.sqrt(missed / energy) if energy > 0 else 0.0
    return stored


def _stored(factor: Tensor, bits: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A factor as it is stored, and what it is then worth."""
    stored = factor.to(dtype) if bits is None else encode(factor, bits)
    return stored, decoded(stored, factor.shape[-1], bits).to(factor.dtype)


def restore(
    adapters: Tensor, codes: Tensor, bases: Tensor, activation: str, shape: tuple[int, int, int], precision: Precision
) -> Tensor:
    """The experts (E, P, D) of one layer and family from stored factors of a bank of `shape` (M, R, D), composed in
    float32."""
    num_bases, rank, columns = shape
    wide_bases = decoded(bases, columns, precision.bases)
    return torch.cat(
        [
            compose(
                decoded(adapters[part], rank, precision.adapters),
                decoded(codes[part], num_bases, precision.codes),
                wide_bases,
                activation,
            )
            for part in expert_chunks(adapters)
        ]
    )
