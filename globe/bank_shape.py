"""The numbers of a bank, from the plan through what is stored to the report."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

from globe.terms import Family


class ExpertSizes(Protocol):
    """Of the experts of a layer."""

    @property
    def num_experts(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...


def sides(sizes: ExpertSizes, family: Family) -> tuple[int, int]:
    """Inputs and outputs of a matrix of the family."""
    P, D = sizes.intermediate_size, sizes.hidden_size
    return (P, D) if family == "down" else (D, P)


@dataclasses.dataclass(frozen=True)
class BankShape:
    """How many matrices of what size share a bank, and of what rank and size it is."""

    num_matrices: int
    """E: expert matrices that share the bank."""
    rows: int
    """P."""
    columns: int
    """D."""
    rank: int
    """R."""
    num_bases: int
    """M."""

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Of the experts W, (E, P, D)."""
        return self.num_matrices, self.rows, self.columns

    @property
    def adapters(self) -> tuple[int, int, int]:
        """Of A, (E, P, R)."""
        return self.num_matrices, self.rows, self.rank

    @property
    def codes(self) -> tuple[int, int]:
        """Of a, (E, M)."""
        return self.num_matrices, self.num_bases

    @property
    def bases(self) -> tuple[int, int, int]:
        """Of B, (M, R, D)."""
        return self.num_bases, self.rank, self.columns

    @property
    def original_parameters(self) -> int:
        """E·P·D."""
        return math.prod(self.matrices)

    @property
    def parameters(self) -> int:
        """E·P·R + M·R·D + E·M."""
        return math.prod(self.adapters) + math.prod(self.bases) + math.prod(self.codes)

    @property
    def share(self) -> float:
        """The parameters over the original ones."""
        return self.parameters / self.original_parameters

    @property
    def step_multiply_adds(self) -> int:
        """Of one evaluation of objective and gradient: mixing, adapters with their Gram matrices, gradient."""
        E, P, D, R, M = self.num_matrices, self.rows, self.columns, self.rank, self.num_bases
        return E * R * D * (M + 6 * P + R)
