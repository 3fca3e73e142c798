"""Experts that are read a part at a time, again on every pass; experts in memory are one part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from globe.bank.objective import Problem


@dataclasses.dataclass(frozen=True)
class ExpertParts:
    """Experts that are read part by part."""

    sizes: Sequence[int]
    """Experts in each part."""
    rows: int
    """P."""
    columns: int
    """D."""
    read: Callable[[int], Problem]
    """A part's experts, near a standard deviation of 1, and their metric."""

    @classmethod
    def in_memory(cls, problem: Problem) -> ExpertParts:
        """All of a problem's experts as one part."""
        count, rows, columns = problem.weights.shape
        return cls([count], rows, columns, lambda _: problem)

    def slices(self) -> list[slice]:
        """Each part's place along E."""
        ends = [sum(self.sizes[: count + 1]) for count in range(len(self.sizes))]
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def energy(self) -> float:
        """Σ_e ‖W_e C^{1/2}‖²_F over all parts."""
        return sum(float(self.read(index).energy()) for index in range(len(self.sizes)))
