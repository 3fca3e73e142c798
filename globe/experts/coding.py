"""A family of a layer as a problem of coding: its experts, what an error in an input costs, and what one in an output.

To second order, the divergence of a model whose experts X_e (N inputs x K outputs) are changed by Δ_e is

    KL ≈ Σ_e tr(Δ_eᵀ C_e Δ_e W_e)

the Fisher information of an expert being taken for the product of two factors (K-FAC, Martens and Grosse 2015, arXiv
1503.05671): C_e, the second moment of its inputs, of the layer's tokens for gate and up, of the expert's own inner
units, weighted by the router, for down; and W_e, that of the gradients of its outputs, of which the diagonal is taken
from the sensitivities (`globe.measure.sensitivity`), which are those of noise that is alike in all inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.stacks import read_family
from globe.errors import CheckpointError
from globe.experts.metric import LayerStatistics
from globe.quant.banked import CodedBank, share_bank
from globe.quant.coded import CodedExperts, Form, Rehearsal, code_experts, rehearse, row_costs, shared_or_not
from globe.quant.feedback import Order
from globe.quant.outputs import Outputs
from globe.quant.side import SharedCosts, misfit
from globe.quant.sizes import LONG_ROW, side_bytes
from globe.quant.trellis import path_length
from globe.quant.water_fill import Rows, widths_at
from globe.terms import Family

SHRINKAGE = 0.05
"""Of C towards the identity, as a share of its mean diagonal; measured, see docs/log.md."""
POWER = 0.7
"""Of the experts' sensitivities: second-order theory overstates the largest; measured, see docs/log.md."""
SHARE_OF_MEAN = 0.1
"""Of the mean, added to each: no expert, and no output of one, is worth nothing."""
LARGEST_WEIGHT = 1e15
"""Beyond it, sums of squares would leave the range of float32."""


@dataclasses.dataclass(frozen=True)
class CodingProblem:
    """The experts of one layer and family, to be coded."""

    X: Tensor
    """(E, N, K), float32."""
    order: Order
    """In which inputs are coded."""
    importance: Tensor
    """(E, K): what a unit of the squared error Δᵀ C Δ of an output costs."""
    second_moment: Tensor
    """C (N, N) of all experts' inputs together."""
    noise: float
    """The squared error of an output that the sensitivities are of."""
    outputs: Outputs
    """What is done to them before they are coded."""

    @functools.cached_property
    def mean_squares(self) -> Tensor:
        """(E, N): of the rows as they are coded."""
        return self.outputs.apply(self.X).square().mean(2)

    @functools.cached_property
    def row_importance(self) -> Tensor:
        """(E,): what a unit of squared error in a row as it is coded costs, spread over its outputs."""
        return self.of_rows(self.importance)

    def of_rows(self, of_outputs: Tensor) -> Tensor:
        """What is said of outputs (E, K), of the rows that are coded (E,)."""
        return (of_outputs if self.outputs.exponents is None else of_outputs / self.outputs.scales().square()).mean(1)

    @functools.cached_property
    def form(self) -> Form:
        """Whether rows have widths and scales of their own, or share them: short ones do where it takes fewer bits."""
        E, N, K = self.X.shape
        if K >= LONG_ROW:
            return "own"
        lost = misfit(row_costs(self.mean_squares, self.row_importance, self.order), self.mean_squares)
        saved = 8 * (side_bytes(E, N, is_shared=False) - side_bytes(E, N, is_shared=True)) / (E * N * K)
        return "own" if lost > saved else "shared"

    @property
    def side_bytes(self) -> int:
        """Stored beside the paths."""
        E, N, _ = self.X.shape
        return side_bytes(E, N, self.form == "shared") + self.outputs.num_bytes

    def costs(self, mean_squares: Tensor) -> Tensor | SharedCosts:
        """Log costs of leaving out rows of these mean squares (E, N), as rows of this form will have them."""
        return shared_or_not(row_costs(mean_squares, self.row_importance, self.order), self.form)

    def rows(self) -> Rows:
        """What water-filling sees first: the rows as they are."""
        return _rows(self.costs(self.mean_squares), self.X.shape[2])

    def bank(self, multiplier: int, num_bases: int | None = None) -> CodedBank | None:
        """What the experts share, if it pays at a multiplier, or as many bases as were found before."""
        importance, prices = self.importance.mean(1), self.order.prices_by_input()
        return share_bank(self.X, self.second_moment, prices, importance, multiplier, num_bases)

    def rehearsed(self, multiplier: int) -> Rehearsed:
        """With the rows as feedback will make them at about this multiplier."""
        widths = widths_at(self.rows().costs, multiplier)
        return Rehearsed(self, rehearse(self.outputs.apply(self.X), self.order, widths))


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """A problem with what feedback will make of its rows."""

    problem: CodingProblem
    expected: Rehearsal

    def rows(self) -> Rows:
        """What water-filling sees in the end."""
        return _rows(self.problem.costs(self.expected.mean_squares), self.problem.X.shape[2])

    def stakes(self, sensitivities: Tensor) -> Tensor:
        """(E, N): the divergence that leaving out a row costs to second order, by the sensitivities (E, K)."""
        problem = self.problem
        of_rows = problem.X.shape[2] * problem.of_rows(sensitivities)[:, None] / problem.noise
        return of_rows * problem.order.unsort(problem.order.prices) * self.expected.mean_squares

    def code(self, multiplier: int, correction: Tensor | None = None) -> tuple[CodedExperts, Tensor]:
        """What is stored, and what it decodes to (E, N, K). What is added as a correction (E, N, K), which is used up,
        changes no width, and so not how much is stored."""
        problem = self.problem
        X = problem.X if correction is None else correction.add_(problem.X)
        costs = problem.costs(self.expected.mean_squares)
        return code_experts(X, problem.outputs, problem.order, costs, multiplier, self.expected)


def _rows(costs: Tensor | SharedCosts, num_outputs: int) -> Rows:
    return Rows(costs.total() if isinstance(costs, SharedCosts) else costs, path_length(num_outputs))


def read_experts(checkpoint: Checkpoint, layer: ExpertLayer, family: Family, experts: slice = slice(None)) -> Tensor:
    """X (E, N, K), float32, of all experts or some next to each other.

    Raises `CheckpointError` naming the tensor that holds NaN or Inf, or the family with weights whose squares would.
    """
    weights = read_family(checkpoint, layer, family, experts).float()
    if (peak := float(weights.abs().max())) > LARGEST_WEIGHT:
        raise CheckpointError(
            f"layer {layer.index} {family} has weights of {peak:.3g}, too large to be coded: mend them, or give --keep"
        )
    return weights if family == "down" else weights.mT.contiguous()


def second_moments(
    statistics: LayerStatistics | None, family: Family, num_inputs: int, experts: slice = slice(None)
) -> Tensor:
    """C (1 or E, N, N), with a mean diagonal of 1, shrunk towards the identity; the identity where nothing is known.

    Those of down are of the experts, of all or some next to each other; those of gate and up of the layer.
    """
    eye = torch.eye(num_inputs)
    if statistics is None:
        return eye[None]
    if family == "down":
        assert statistics.inner is not None
        found = statistics.inner[experts]
    else:
        found = statistics.inputs[None]
    mean = found.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    scaled = torch.where(mean > 0, found / mean.clamp_min(torch.finfo(mean.dtype).tiny), eye)
    return scaled + SHRINKAGE * eye


def damped(sensitivities: Mapping[tuple[int, Family], Tensor]) -> dict[tuple[int, Family], Tensor]:
    """Sensitivities (E, K) by layer and family, as importance.

    Of an expert: (s + 0.1 mean)^0.7; shared out among its outputs by s + 0.1 mean.
    """
    experts = {key: each.sum(1) for key, each in sensitivities.items()}
    mean = torch.cat([*experts.values()]).mean()
    if not mean > 0:
        return {key: torch.ones_like(each) for key, each in sensitivities.items()}
    return {
        key: ((experts[key] / mean + SHARE_OF_MEAN).pow(POWER) / each.shape[1])[:, None] * _relative(each)
        for key, each in sensitivities.items()
    }


def _relative(sensitivities: Tensor) -> Tensor:
    """Of an expert's outputs (E, K), with a mean of 1; all alike where nothing is known."""
    mean = sensitivities.mean(1, keepdim=True)
    relative = torch.where(mean > 0, sensitivities / mean.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)
    return (relative + SHARE_OF_MEAN) / (1 + SHARE_OF_MEAN)
