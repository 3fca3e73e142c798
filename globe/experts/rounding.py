"""A family of a layer as a problem of rounding: what its widths would cost, and what becomes of it at one of them.

The same second-order loss as in `globe.experts.coding`; here all weights of a layer have the same bits.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from globe.checkpoint.compressed_tensors import group_size
from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint
from globe.experts.coding import read_experts, second_moments
from globe.experts.metric import LayerStatistics
from globe.quant.feedback import Order, order_inputs
from globe.quant.rounding import RoundedExperts, fit_scales, round_experts
from globe.terms import Family


@dataclasses.dataclass(frozen=True)
class RoundingProblem:
    """The experts of one layer and family, to be rounded."""

    X: Tensor
    """(E, N, K), float32."""
    second_moments: Tensor
    """C (1 or E, N, N) of the inputs."""
    noise: float
    """The squared error of an output that the sensitivities are of."""
    size: int
    """Inputs in a group."""
    scale_dtype: torch.dtype

    @functools.cached_property
    def order(self) -> Order:
        """In which inputs are rounded."""
        return order_inputs(self.second_moments, falling=True)

    def losses(self, bits: int) -> Tensor:
        """What is lost of each output (E, K) to second order, in the unit of its sensitivity: the error of rounding
        without feedback at the prices with it, which is close to the error with it."""
        prices = self.order.unsort(self.order.prices)
        _, costs = fit_scales(self.X, prices, bits, self.size, self.scale_dtype)
        return costs.double() / (self.noise or 1.0)

    def round(self, bits: int) -> RoundedExperts:
        return round_experts(self.X, self.second_moments, self.order, bits, self.size, self.scale_dtype)


def rounding_problem(
    checkpoint: Checkpoint,
    layer: ExpertLayer,
    family: Family,
    statistics: LayerStatistics | None,
    scale_dtype: torch.dtype,
) -> RoundingProblem:
    """Read the experts of a family of a layer; C is the identity without `statistics`.

    Raises as `read_experts` does.
    """
    X = read_experts(checkpoint, layer, family)
    noise = X.shape[1] * float(X.square().mean())
    return RoundingProblem(X, second_moments(statistics, family, X.shape[1]), noise, group_size(layer), scale_dtype)
