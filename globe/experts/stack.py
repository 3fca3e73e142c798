"""The expert matrices of a bank as one normalised stack, and the bank's factors as they are stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from globe.bank.objective import InputMetric
from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.stacks import read_family
from globe.experts.metric import LayerStatistics, input_metric, row_scales
from globe.plan.scopes import BankPlan
from globe.terms import Family


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
    weights = torch.empty(bank.shape.matrices)
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
