"""Variable projection: adapters eliminated exactly, accelerated first-order steps on codes and bases.

The gradient of min_A f flows through T alone (`globe.bank.objective`). The step is Adam's (Kingma and Ba 2015) with
betas (0.85, 0.9), its size in standard deviations of each factor, which makes it invariant to the scale of f and of
the weights.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from globe.bank.codes import CODE_FLOOR, on_simplex, prune, simplex_preimage
from globe.bank.objective import Problem, Projection, expert_chunks, project
from globe.bank.rounding import round_nearest

FIRST_DECAY, SECOND_DECAY = 0.85, 0.9
"""Measured, see docs/log.md."""


@dataclasses.dataclass
class Accelerated:
    """One factor and its moments, moved in place.

    The rows of a basis matrix (the middle dimension of a bank, M x R x D) share their second moments: they are then as
    good as one for each entry (docs/log.md) and no tensor of the bank's size.
    """

    value: Tensor
    scale: float
    """Step size at length 1."""
    first: Tensor = dataclasses.field(init=False)
    second: Tensor = dataclasses.field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        self.first = torch.zeros_like(self.value)
        self.second = torch.zeros_like(self.value[:, :1] if self.value.dim() == 3 else self.value)

    def step(self, gradient: Tensor, length: float) -> None:
        self.count += 1
        size = -length * self.scale / (1 - FIRST_DECAY**self.count)
        for part in expert_chunks(gradient):  # the temporaries stay small, and in cache
            first, second, now = self.first[part], self.second[part], gradient[part]
            first.lerp_(now, 1 - FIRST_DECAY)
            second.lerp_(self._squares(now), 1 - SECOND_DECAY)
            root = (second / (1 - SECOND_DECAY**self.count)).sqrt_().add_(torch.finfo(now.dtype).tiny)
            self.value[part].addcdiv_(first, root, value=size)

    def _squares(self, gradient: Tensor) -> Tensor:
        squares = gradient.square()
        return squares.mean(1, keepdim=True) if squares.dim() == 3 else squares

    def restart(self, value: Tensor) -> None:
        self.value.copy_(value)
        self.first.zero_()
        self.second.zero_()
        self.count = 0


def rounded_bank(bases: Tensor, bits: int | None) -> Tensor:
    """The bank as it will be stored: rounded to `bits`, or as it is."""
    return bases if bits is None else round_nearest(bases, bits)


def spread(factor: Tensor) -> float:
    """The standard deviation of a factor's entries, by which its steps are measured; 1 for a single entry."""
    return float(factor.std()) if factor.numel() > 1 else 1.0


class VariableProjection:
    """The iterate (a, B) of the solver, its exact adapters implied.

    Signed codes are moved themselves, with `fixed_support` only where they are not 0; codes on the simplex are moved
    through scores z with a = map(z / T).
    """

    def __init__(
        self,
        problem: Problem,
        codes: Tensor,
        bases: Tensor,
        activation: str,
        code_map: str,
        learning_rate: float,
        temperature: float,
        *,
        fixed_support: bool = False,
    ) -> None:
        self._problem, self._activation, self._code_map = problem, activation, code_map
        self._bank_bits: int | None = None
        self._energy = problem.energy()
        self.codes = codes
        self._mask = codes != 0 if fixed_support else None
        self._bases = Accelerated(bases.clone(), learning_rate * spread(bases))
        scores = self._scores_of(codes, temperature)
        self._scores = Accelerated(scores, learning_rate * max(spread(scores), 1e-3))
        self._projection = self._project()

    @property
    def bases(self) -> Tensor:
        return self._bases.value

    @property
    def objective(self) -> float:
        return self._projection.objective

    @property
    def num_fallbacks(self) -> int:
        return self._projection.num_fallbacks

    def step(self, length: float, temperature: float, bank_bits: int | None = None) -> None:
        """Move codes and bases by `length` of the full step; a fixed support stays what it was.

        With `bank_bits` the objective and its gradient are from now on those of the rounded bank, and the gradient
        moves the bank behind it (the straight-through estimator; Bengio et al. 2013).
        """
        self._bank_bits = bank_bits
        grad_codes, grad_bases = self._projection.grad_codes, self._projection.grad_bases
        assert grad_codes is not None
        assert grad_bases is not None
        self._projection = dataclasses.replace(self._projection, grad_codes=None, grad_bases=None)
        if self._code_map == "ridge":
            self._scores.step(grad_codes, length)
            if self._mask is not None:
                self._scores.value.mul_(self._mask)
            self.codes = self._scores.value
        else:
            self._scores.step(self._through_map(grad_codes, temperature), length)
            self.codes = prune(on_simplex(self._scores.value / temperature, self._code_map), CODE_FLOOR)
        self._bases.step(grad_bases, length)
        del grad_bases  # a bank's size: let it go before the next one is made
        self._projection = self._project()

    def restart(self, codes: Tensor, bases: Tensor, temperature: float) -> None:
        """Return to given factors with the moments forgotten."""
        self._scores.restart(self._scores_of(codes, temperature))
        self._bases.restart(bases)
        self.codes = codes.clone() if self._code_map != "ridge" else self._scores.value
        self._projection = self._project()

    def _scores_of(self, codes: Tensor, temperature: float) -> Tensor:
        if self._code_map == "ridge":
            return codes.clone()
        if self._code_map == "softmax":  # reaches no zero: a tenth of the floor, from where a pruned code can return
            codes = codes.clamp_min(0.1 * CODE_FLOOR)
        return simplex_preimage(codes, self._code_map) * temperature

    def _project(self) -> Projection:
        bases = rounded_bank(self.bases, self._bank_bits)
        return project(self._problem, self.codes, bases, self._activation, energy=self._energy, gradient=True)

    def _through_map(self, grad_codes: Tensor, temperature: float) -> Tensor:
        scores = self._scores.value.detach().requires_grad_()
        with torch.enable_grad():
            mapped = on_simplex(scores / temperature, self._code_map)
        return torch.autograd.grad(mapped, scores, grad_codes)[0]
