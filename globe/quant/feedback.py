"""Error feedback: what is lost in one input is made up for by the inputs still to come.

With C the second moment of the inputs and UᵀU = C⁻¹, U upper triangular, the least of tr((X − Q)ᵀ C (X − Q)) over the
inputs not yet coded is reached by subtracting U_ij / U_ii times the error of input i from each later input j, and that
error then costs d_i = 1 / U_ii² instead of C_ii (Frantar et al. 2022, GPTQ; Babai's nearest plane; WaterSIC, arXiv
2603.04956). Inputs go by growing variance, so that those which carry most can still be adjusted last.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from globe.quant.threads import run_all

BLOCK, _FEW = 64, 8
"""Inputs between two updates of all inputs to come, and of those of the block."""


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which inputs are coded, and where their errors go. All with a leading dimension S: 1 or E."""

    inputs: Tensor
    """(S, N): the input that is coded first, second, ..."""
    shares: Tensor
    """(S, N, N), unit upper triangular, in that order: U_ij / U_ii, the part of i's error that j takes away."""
    prices: Tensor
    """(S, N), in that order: d_i, what a unit of squared error in i costs."""

    def __getitem__(self, experts: slice) -> Order:
        """That of some experts next to each other."""
        if len(self.inputs) == 1:
            return self
        return Order(self.inputs[experts], self.shares[experts], self.prices[experts])

    def sort(self, x: Tensor) -> Tensor:
        """Quantities (E, N, ...) of the inputs in the order of coding."""
        return x.gather(1, self._index(x))

    def unsort(self, x: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return torch.empty_like(x).scatter_(1, self._index(x), x)

    def prices_by_input(self) -> Tensor:
        """(S, N), in the order of the inputs themselves."""
        return torch.empty_like(self.prices).scatter_(1, self.inputs, self.prices)

    def _index(self, x: Tensor) -> Tensor:
        index = self.inputs.view(*self.inputs.shape, *([1] * (x.dim() - 2)))
        return index.expand(x.shape)


def order_inputs(second_moments: Tensor, *, falling: bool = False) -> Order:
    """The order for second moments (S, N, N), positive definite: damping is the caller's. Computed in float64.

    By growing variance, or, where all inputs have the same bits, by falling variance, which makes prices more alike.
    Raises `ValueError` when a matrix is not positive definite.
    """
    inputs = second_moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=falling, stable=True)
    shares = torch.empty(second_moments.shape, device=inputs.device)
    prices, failed = torch.empty(inputs.shape, device=inputs.device), list[int]()
    linalg: Any = torch.linalg
    eye = torch.eye(inputs.shape[1], dtype=torch.float64, device=inputs.device)

    def solve(s: int) -> None:  # in float64 those of as many experts as there are threads
        # C = R Rᵀ, R the reversed Cholesky factor of C reversed, upper triangular; U = R⁻¹, shares and prices follow
        places = inputs[s]
        factor, info = linalg.cholesky_ex(second_moments[s].double()[places][:, places].flip(0, 1))
        if int(info):
            failed.append(s)
            return
        upper = factor.flip(0, 1)
        diagonal = upper.diagonal()
        shares[s] = linalg.solve_triangular(upper / diagonal, eye, upper=True, unitriangular=True)
        prices[s] = diagonal.square()

    run_all([functools.partial(solve, s) for s in range(len(inputs))])
    if failed:
        raise ValueError(
            f"second moments {', '.join(map(str, sorted(failed)))} of {len(inputs)} are not positive definite: add a "
            "part of their mean diagonal"
        )
    return Order(inputs, shares, prices)


def code_inputs(rows: Tensor, order: Order, code_rows: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Code rows (E, N, K), in the order of coding, one input after the other with feedback; what they became.

    `code_rows(i, rows (E, K))` returns the i-th input's rows as they are decoded. The result is in the order of coding,
    and takes the place of the rows, which can be as large as the layer.
    """
    now, num_inputs = rows, rows.shape[1]
    for start in range(0, num_inputs, BLOCK):
        stop = min(start + BLOCK, num_inputs)
        coded = torch.empty_like(now[:, start:stop])
        for first in range(start, stop, _FEW):
            last = min(first + _FEW, stop)
            for i in range(first, last):
                coded[:, i - start] = code_rows(i, now[:, i])
                now[:, i] -= coded[:, i - start]  # the error, until the block is done
                now[:, i + 1 : last] -= order.shares[:, i, i + 1 : last, None] * now[:, i, None]
            _make_up(now, order, slice(first, last), slice(last, stop))
        _make_up(now, order, slice(start, stop), slice(stop, num_inputs))
        now[:, start:stop] = coded
    return now


def _make_up(now: Tensor, order: Order, errors: slice, later: slice) -> None:
    """Take the shares in some inputs' errors from later ones."""
    if later.start < later.stop:
        shares = order.shares[:, errors, later].mT.expand(len(now), -1, -1)
        now[:, later].baddbmm_(shares, now[:, errors], alpha=-1)
