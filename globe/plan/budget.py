"""How much of the experts is stored, and the bank that is chosen for it."""

from __future__ import annotations

import dataclasses
import math

from globe.bank_shape import BankShape
from globe.errors import SettingsError

ADAPTER_SHARE = 0.68
"""Share of the kept parameters that goes to the adapters while R < P; measured, see docs/log.md."""
LEAST_BITS, MOST_BITS = 1.5, 8.0
"""Bits per weight that experts are coded in."""
MOST_PACKED_BITS = 10.0
"""Of 8 bits with a scale for a few weights."""
DEFAULT_BITS = 4.0
"""What is spent where nothing is asked: measured, see docs/log.md."""


@dataclasses.dataclass(frozen=True)
class Keep:
    """A share of the parameters, above 0 and below 1, in banks of floating-point factors.

    Raises `SettingsError` for any other.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            percent = f" ({self.share:g} % is {self.share / 100:g})" if 1 < self.share < 100 else ""
            raise SettingsError(f"keep is {self.share:g}; it must be above 0 and below 1{percent}")

    def shape_for(self, matrices: tuple[int, int, int]) -> BankShape:
        """A bank for matrices (E, P, D) that stores at most this share of their parameters.

        R = P while the adapters then take at most two thirds of what is kept, else the rank that gives them that share
        (more where the bank could not use the rest); the bank takes the rest, and of the ranks within 5 % of that the
        one that leaves least of the budget unused. Raises `SettingsError` with the reachable range when no bank fits.
        """
        num_matrices, rows, columns = matrices
        lowest = least_share(matrices)
        if self.share < lowest:
            from_here = _rounded_up(lowest)
            reach = f"choose from {from_here:g} to below 1" if from_here < 1 else "nothing can be saved"
            raise SettingsError(
                f"keep {self.share:g} is out of reach for {num_matrices} experts of {rows} x {columns}; {reach}"
            )
        total = num_matrices * rows * columns

        def affordable(rank: int) -> int:
            return int((self.share * total - num_matrices * rows * rank) / (rank * columns + num_matrices))

        highest = min(rows, max(1, round(ADAPTER_SHARE * self.share * columns)))
        while highest < min(rows, columns) and affordable(highest) >= num_matrices:
            highest += 1
        shapes: list[BankShape] = []
        for rank in range(highest, 0, -1):
            num_bases = min(num_matrices, affordable(rank))
            if num_bases >= 1:
                shapes.append(BankShape(*matrices, rank, num_bases))
            if shapes and rank < 0.95 * shapes[0].rank:
                break
        least = _least(matrices)  # a rounding short of which the share may be
        return max(shapes, key=lambda shape: (shape.parameters, shape.rank), default=least)


@dataclasses.dataclass(frozen=True)
class Ratios:
    """Banks of a given rank and size; `SettingsError` for ratios that are not above 0 and at most 1."""

    rank: float
    """R / P."""
    basis: float
    """M / E, E counting all the matrices that share a bank."""

    def __post_init__(self) -> None:
        for name, ratio in (("rank_ratio", self.rank), ("basis_ratio", self.basis)):
            if not 0 < ratio <= 1:
                raise SettingsError(f"{name} is {ratio}; it must be above 0 and at most 1")

    def shape_for(self, matrices: tuple[int, int, int]) -> BankShape:
        """The bank for matrices (E, P, D), of one basis of one row at least."""
        num_matrices, rows, _ = matrices
        return BankShape(*matrices, max(1, round(self.rank * rows)), max(1, round(self.basis * num_matrices)))


@dataclasses.dataclass(frozen=True)
class Bits:
    """No banks in floating point, but every expert coded.

    Raises `SettingsError` for a number of bits out of range.
    """

    per_weight: float
    """Stored bits per original weight, everything counted."""
    most: float = MOST_BITS

    def __post_init__(self) -> None:
        if not LEAST_BITS <= self.per_weight <= self.most:
            raise SettingsError(
                f"bits is {self.per_weight:g}; stored bits per original weight must be from {LEAST_BITS:g} to "
                f"{self.most:g}: for more, give keep, for less, choose a smaller model"
            )

    def num_bytes(self, parameters: int) -> int:
        """What they may take, stored."""
        return int(self.per_weight * parameters / 8)


Budget = Keep | Ratios | Bits


def least_share(matrices: tuple[int, int, int]) -> float:
    """The share of the parameters that the least bank of matrices (E, P, D) has."""
    return _least(matrices).share


def _least(matrices: tuple[int, int, int]) -> BankShape:
    return BankShape(*matrices, rank=1, num_bases=1)


def _rounded_up(value: float) -> float:
    """To two significant digits or so: what is said to be in reach is."""
    scale = 10.0 ** (1 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale
