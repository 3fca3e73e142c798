"""The factorised experts: What_e = A_e · φ(Σ_j a_ej B_j).

Shape suffixes on local names, used in all of `globe.bank`, `globe.init` and `globe.train`:

    E experts   P rows of an expert   D columns   R rank   M bases
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from globe.bank.activations import activate


def mix(codes: Tensor, bases: Tensor) -> Tensor:
    """T_e = Σ_j a_ej B_j as one matrix product: (E, M), (M, R, D) -> (E, R, D)."""
    return (codes @ bases.flatten(1)).view(codes.shape[0], *bases.shape[1:])


def compose(adapters: Tensor, codes: Tensor, bases: Tensor, activation: str) -> Tensor:
    """What_e = A_e φ(Σ_j a_ej B_j): (E, P, R), (E, M), (M, R, D) -> (E, P, D), in the factors' dtype."""
    return adapters @ activate(mix(codes, bases), activation)


@dataclasses.dataclass(frozen=True)
class Factors:
    """A bank and the adapters and codes of the experts that share it."""

    adapters: Tensor
    """A, (E, P, R): each expert's own left factor, in the units of the weights."""
    codes: Tensor
    """a, (E, M): each expert's mixture of the bases."""
    bases: Tensor
    """B, (M, R, D): the bank."""
    activation: str
    """φ: identity, silu or tanh."""

    def compose(self) -> Tensor:
        """The dense experts What, (E, P, D)."""
        return compose(self.adapters, self.codes, self.bases, self.activation)

    @property
    def num_parameters(self) -> int:
        """Stored parameters: E·P·R + M·R·D + E·M."""
        return self.adapters.numel() + self.codes.numel() + self.bases.numel()
