"""Experts rounded to a uniform grid in groups, with error feedback, for kernels that others serve.

Orientation: X (E experts, N inputs, K outputs). A group is `size` consecutive inputs of an output: one scale, and for
each input a number from −2^(b−1) to 2^(b−1) − 1. The bits are the same for all, so that feedback does best when prices
are alike: inputs go by falling variance, the largest first (their prices multiply to det C in any order).

    scales = fit_scales(X, prices, …)                the range whose rounding costs least before any feedback
    numbers = round by code_inputs                   each error made up for by the inputs to come (feedback.py)
    scales = argmin tr((X − sQ)ᵀ C (X − sQ))         given the numbers Q: least squares for each output
    numbers and scales                               once more
"""

# `torch.linalg` has no type stubs
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor

from globe.quant.feedback import Order, code_inputs

_RANGES = tuple(1.12 - 0.02 * step for step in range(22))
"""Of the largest number of a group, where the end of the grid is tried."""
_ROUNDS = 2
_RIDGE = 1e-6
"""Of the mean diagonal, added where scales are solved for: a group whose numbers are all zero has none."""


@dataclasses.dataclass(frozen=True)
class RoundedExperts:
    """Experts on grids."""

    numbers: Tensor
    """(E, N, K) int8."""
    scales: Tensor
    """(E, N / size, K), in the dtype that they are stored in; of either sign, for a grid reaches further below zero."""

    def decode(self) -> Tensor:
        """(E, N, K) float32."""
        return self.numbers * _spread(self.scales.float(), self.numbers)


def fit_scales(X: Tensor, prices: Tensor, bits: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales (E, N / size, K) of the ranges whose rounding costs least, and that cost (E, K).

    `prices` (1 or E, N) are what a unit of squared error in an input costs. The end of the grid that reaches further
    lies where the largest number of the group is, so that scales have either sign.
    """
    E, N, K = X.shape
    groups, weights = X.reshape(E, N // size, size, K), prices.reshape(-1, N // size, size, 1)
    extremes = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    scales, costs = torch.empty_like(extremes, dtype=dtype), torch.full_like(extremes, torch.inf)
    for share in _RANGES:
        tried = _stored(extremes * (-share / (1 << bits - 1)), dtype)
        step = tried.float()[:, :, None]
        cost = ((groups - _to_grid(groups / step, bits) * step).square() * weights).sum(2)
        better = cost < costs
        scales, costs = torch.where(better, tried, scales), torch.where(better, cost, costs)
    return scales, costs.sum(1)


def round_experts(
    X: Tensor, second_moments: Tensor, order: Order, bits: int, size: int, dtype: torch.dtype
) -> RoundedExperts:
    """Round X (E, N, K), of inputs with second moments (1 or E, N, N), to `bits` in groups of `size` inputs.

    `order` is of the second moments, by falling variance; scales are stored in `dtype`.
    """
    scales, _ = fit_scales(X, order.unsort(order.prices), bits, size, dtype)
    numbers = torch.empty(0)
    for _ in range(_ROUNDS):
        numbers = _with_feedback(X, order, scales, bits)
        scales = _refit(X, second_moments, numbers, scales)
    return RoundedExperts(numbers.to(torch.int8), scales)


def _with_feedback(X: Tensor, order: Order, scales: Tensor, bits: int) -> Tensor:
    """The numbers (E, N, K), float32."""
    rows, steps = order.sort(X.clone()), order.sort(_spread(scales.float(), X))
    numbers = torch.empty_like(rows)

    def code_rows(i: int, now: Tensor) -> Tensor:
        numbers[:, i] = _to_grid(now / steps[:, i], bits)
        return numbers[:, i] * steps[:, i]

    code_inputs(rows, order, code_rows)
    return order.unsort(numbers)


def _refit(X: Tensor, second_moments: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """The scales that cost least with these numbers, by the normal equations of each output; an expert at a time."""
    E, N, K = X.shape
    num_groups, found = scales.shape[1], torch.empty_like(scales)
    grouped = numbers.view(E, num_groups, N // num_groups, K).mT
    eye = torch.eye(num_groups, dtype=torch.float64, device=X.device)
    for expert, C in enumerate(second_moments.expand(E, -1, -1)):
        Q = grouped[expert]  # (groups, K, size)
        products = (Q @ C.view(num_groups, -1, N)).view(num_groups, K, num_groups, -1)
        gram = (products * Q.transpose(0, 1)).sum(3).transpose(0, 1).double()  # (K, groups, groups)
        seen = ((C @ X[expert]).view(num_groups, -1, K).mT * Q).sum(2).T.double()
        ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        solved = cast(Tensor, torch.linalg.solve_ex(gram + ridge[:, None, None] * eye, seen)[0])
        found[expert] = solved.T.to(scales.dtype)
    usable = found.isfinite() & (found != 0) & (grouped != 0).any(3)
    return torch.where(usable, found, scales)


def _to_grid(units: Tensor, bits: int) -> Tensor:
    """The nearest numbers of the grid."""
    half = 1 << bits - 1
    return units.round().clamp(-half, half - 1)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to what is stored; a group of zeros has any scale but zero."""
    rounded = scales.to(dtype)
    return torch.where(rounded == 0, torch.finfo(dtype).tiny, rounded)


def _spread(scales: Tensor, rows: Tensor) -> Tensor:
    """A scale for each input."""
    return scales.repeat_interleave(rows.shape[1] // scales.shape[1], 1)
