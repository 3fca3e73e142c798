"""Variable projection: adapters eliminated exactly, accelerated first-order steps on codes and bases.

The gradient of min_A f flows through T alone (`globe.bank.objective`). The step is Adam's (Kingma and Ba 2015) with
betas (0.85, 0.9), its size in standard deviations of each factor, which makes it invariant to the scale of f and of
the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from globe.bank.codes import CODE_FLOOR, on_simplex, prune, simplex_preimage
from globe.bank.objective import Projection, expert_chunks, project
from globe.train.parts import ExpertParts

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


def spread(factor: Tensor) -> float:
    """The standard deviation of a factor's entries, by which its steps are measured; 1 for a single entry."""
    return float(factor.std()) if factor.numel() > 1 else 1.0


class VariableProjection:
    """The iterate (a, B) of the solver, its exact adapters implied: evaluated in one pass over the parts, then moved.

    Signed codes are moved themselves, with `fixed_support` only where they are not 0; codes on the simplex are moved
    through scores z with a = map(z / T). Holds the bank, its first moments and its gradient.
    """

    def __init__(
        self,
        parts: ExpertParts,
        codes: Tensor,
        bases: Tensor,
        activation: str,
        code_map: str,
        learning_rate: float,
        temperature: float,
        *,
        energy: float,
        fixed_support: bool = False,
    ) -> None:
        self._parts, self._activation, self._code_map = parts, activation, code_map
        self._energy = codes.new_tensor(energy)
        self.codes = codes
        self._mask = codes != 0 if fixed_support else None
        self._bases = Accelerated(bases, learning_rate * spread(bases))
        scores = self._scores_of(codes, temperature)
        self._scores = Accelerated(scores, learning_rate * max(spread(scores), 1e-3))
        self._projection: Projection | None = None

    @property
    def bases(self) -> Tensor:
        return self._bases.value

    def evaluate(self) -> Projection:
        """The objective of the iterate, with the gradients that the next move follows."""
        total, num_fallbacks = 0.0, 0
        grad_codes, grad_bases = torch.empty_like(self.codes), torch.zeros_like(self.bases)
        for index, own in enumerate(self._parts.slices()):
            projected = project(
                self._parts.read(index),
                self.codes[own],
                self.bases,
                self._activation,
                energy=self._energy,
                gradient=True,
                grad_bases=grad_bases,
            )
            assert projected.grad_codes is not None
            grad_codes[own] = projected.grad_codes
            total, num_fallbacks = total + projected.objective, num_fallbacks + projected.num_fallbacks
        self._projection = Projection(total, num_fallbacks, grad_codes, grad_bases)
        return self._projection

    def move(self, length: float, temperature: float) -> None:
        """Move codes and bases by `length` of the full step; a fixed support stays what it was."""
        assert self._projection is not None
        grad_codes, grad_bases = self._projection.grad_codes, self._projection.grad_bases
        assert grad_codes is not None
        assert grad_bases is not None
        self._projection = None
        if self._code_map == "ridge":
            self._scores.step(grad_codes, length)
            if self._mask is not None:
                self._scores.value.mul_(self._mask)
            self.codes = self._scores.value
        else:
            self._scores.step(self._through_map(grad_codes, temperature), length)
            self.codes = prune(on_simplex(self._scores.value / temperature, self._code_map), CODE_FLOOR)
        self._bases.step(grad_bases, length)

    def restart(self, codes: Tensor, bases: Tensor, temperature: float) -> None:
        """Return to given factors with the moments forgotten, and evaluate them."""
        self._scores.restart(self._scores_of(codes, temperature))
        self._bases.restart(bases)
        self.codes = codes.clone() if self._code_map != "ridge" else self._scores.value
        self._projection = None
        self.evaluate()

    def state(self) -> dict[str, Tensor]:
        """All that moves, for signed codes."""
        return {
            "codes": self._scores.value,
            "codes.first": self._scores.first,
            "codes.second": self._scores.second,
            "bases": self._bases.value,
            "bases.first": self._bases.first,
            "bases.second": self._bases.second,
            "scales": torch.tensor([self._scores.scale, self._bases.scale], dtype=torch.float64),
            "count": torch.tensor(self._bases.count),
        }

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned, which becomes this solver's own."""
        for name, factor in (("codes", self._scores), ("bases", self._bases)):
            factor.value, factor.first, factor.second = (
                state[name],
                state[f"{name}.first"],
                state[f"{name}.second"],
            )
            factor.count = int(state["count"])
        self._scores.scale, self._bases.scale = map(float, state["scales"])
        self.codes = self._scores.value

    def _scores_of(self, codes: Tensor, temperature: float) -> Tensor:
        if self._code_map == "ridge":
            return codes.clone()
        if self._code_map == "softmax":  # reaches no zero: a tenth of the floor, from where a pruned code can return
            codes = codes.clamp_min(0.1 * CODE_FLOOR)
        return simplex_preimage(codes, self._code_map) * temperature

    def _through_map(self, grad_codes: Tensor, temperature: float) -> Tensor:
        scores = self._scores.value.detach().requires_grad_()
        with torch.enable_grad():
            mapped = on_simplex(scores / temperature, self._code_map)
        return torch.autograd.grad(mapped, scores, grad_codes)[0]
