"""All experts of a family of a layer, to be coded, of which memory holds a part at a time.

Experts are coded independently of each other, but for a bank and for whether outputs are scaled. What those depend on
is small, or is found from some of the outputs; so the parts together are what the family would be as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint
from globe.experts.coding import CodingProblem, read_experts, second_moments
from globe.experts.metric import LayerStatistics
from globe.quant.banked import CodedBank, share_bank
from globe.quant.feedback import Order, order_inputs
from globe.quant.outputs import Outputs, fit_outputs, rotate
from globe.quant.sizes import LONG_ROW, MOST_WEIGHTS
from globe.quant.threads import split
from globe.quant.water_fill import Rows
from globe.terms import Family

T = TypeVar("T")

_TELLING, _FEWEST = 1 << 24, 64
"""Weights of a family, and outputs of each expert, that tell what experts have in common."""


@dataclasses.dataclass(frozen=True)
class ExpertFamily:
    """The experts of one layer and family, and what is known of them."""

    checkpoint: Checkpoint
    layer: ExpertLayer
    family: Family
    statistics: LayerStatistics | None
    """None: C is the identity."""
    sensitivities: Tensor
    """(E, K), damped."""
    bank: CodedBank | None = None
    """Whose mixtures are taken from the experts."""
    known_squares: Tensor | None = None
    """`mean_squares`, where they were found before: it takes a look at all experts to find them."""
    _last: list[tuple[slice, Tensor]] = dataclasses.field(default_factory=list[tuple[slice, Tensor]], repr=False)
    """The part that was read last."""

    @functools.cached_property
    def parts(self) -> list[slice]:
        """Experts that are in memory at once."""
        E, K = self.sensitivities.shape
        weights = self.layer.num_experts * self.layer.intermediate_size * self.layer.hidden_size
        count = -(-weights // MOST_WEIGHTS) if K >= LONG_ROW else 1  # shorter rows may share widths
        return split(E, count)

    def problem(self, part: slice) -> CodingProblem:
        """A part, and what an error in it costs. Raises as `read_experts` does."""
        C = self._moments(part)
        order = order_inputs(C) if self._has_own_inputs else self._shared_order
        X, outputs = self._left(part), self._outputs[torch.arange(part.start, part.stop)]
        return CodingProblem(X, order, self._importance[part], C.mean(0), self._noise or 1.0, outputs)

    def by_part(self, work: Callable[[slice, CodingProblem], T]) -> list[T]:
        """What is made of each part, which is let go before the next is read."""
        return [work(part, self.problem(part)) for part in self.parts]

    def without(self, bank: CodedBank | None) -> ExpertFamily:
        """What is left of the experts when the bank's mixtures are taken from them."""
        return self if bank is None else dataclasses.replace(self, bank=bank)

    def find_bank(self, multiplier: int, num_bases: int | None = None) -> CodedBank | None:
        """What the experts share, if it pays at a multiplier, or as many bases as were found before.

        Of a large family it is found from some of the outputs of all experts, mixed: from no more weights than one
        part has, and from enough to tell what experts have in common.
        """
        if num_bases == 0:
            return None
        E, K = self.sensitivities.shape
        if (step := telling_step(E, self.num_inputs, K, len(self.parts))) == 1:
            return self.problem(*self.parts).bank(multiplier, num_bases)
        some = slice(None, None, step)
        X = torch.cat([rotate(self.read(part))[:, :, some] for part in self.parts])
        C, prices = torch.zeros(self.num_inputs, self.num_inputs), list[Tensor]()
        for part in self.parts if self._has_own_inputs else self.parts[:1]:
            moments = self._moments(part)
            prices.append(order_inputs(moments).prices_by_input())
            C += moments.sum(0)
        C /= sum(map(len, prices))
        return share_bank(X, C, torch.cat(prices), self._importance.mean(1), multiplier, num_bases, self._mixed)

    def _mixed(self, mixing: Tensor) -> Tensor:
        """Σ_e m_je X_e (M, N, K) for m (M, E)."""
        found = torch.zeros(len(mixing), self.num_inputs, self.sensitivities.shape[1])
        for part in self.parts:
            found += torch.einsum("me,enk->mnk", mixing[:, part], self.read(part))
        return found

    @property
    def num_inputs(self) -> int:
        """N."""
        P, D = self.layer.intermediate_size, self.layer.hidden_size
        return P if self.family == "down" else D

    @property
    def _has_own_inputs(self) -> bool:
        """Whether each expert has a C of its own."""
        return self.statistics is not None and self.family == "down"

    @functools.cached_property
    def _shared_order(self) -> Order:
        return order_inputs(self._moments(self.parts[0]))

    def _moments(self, part: slice) -> Tensor:
        """C (n, N, N) of a part, or (1, N, N) that all share."""
        return second_moments(self.statistics, self.family, self.num_inputs, part)

    @functools.cached_property
    def mean_squares(self) -> Tensor:
        """(E, K): of the weights of each output."""
        if self.known_squares is not None:
            return self.known_squares
        return torch.cat([self.read(part).square().mean(1) for part in self.parts])

    @functools.cached_property
    def _noise(self) -> float:
        """The squared error of an output that sensitivities are of: N times the mean square of the weights."""
        return self.num_inputs * float(self.mean_squares.mean())

    @functools.cached_property
    def _importance(self) -> Tensor:
        """(E, K): what a unit of the squared error of an output costs."""
        return self.sensitivities / self._noise if self._noise > 0 else torch.zeros_like(self.sensitivities)

    @functools.cached_property
    def _outputs(self) -> Outputs:
        """What is done to all of them before they are coded."""
        left = self.mean_squares
        if self.bank is not None:
            left = torch.cat([self._left(part).square().mean(1) for part in self.parts])
        return fit_outputs(left, self.num_inputs, self._importance)

    def _left(self, part: slice) -> Tensor:
        """X (n, N, K) of a part, less the bank's mixtures."""
        X = self.read(part)
        if self.bank is None:
            return X
        return X - self.bank.add_to(torch.zeros_like(X), torch.arange(part.start, part.stop))

    def read(self, part: slice) -> Tensor:
        """X (n, N, K) of a part as it is."""
        if [held for held, _ in self._last] != [part]:
            self._last.clear()
            self._last.append((part, read_experts(self.checkpoint, self.layer, self.family, part)))
        ((_, X),) = self._last
        return X


def telling_step(E: int, N: int, K: int, num_parts: int) -> int:
    """Of how many outputs one is looked at for what E experts have in common, in a family of so many parts."""
    return max(num_parts, min(math.ceil(E * N * K / _TELLING), K // _FEWEST), 1)


def joined(rows: Sequence[Rows]) -> Rows:
    """Rows of parts as those of the family."""
    return Rows(torch.cat([each.costs for each in rows]), rows[0].length)
