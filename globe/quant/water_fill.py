"""How many bits an entry of a row gets: reverse water-filling over rows, by one multiplier for a whole model.

A row that costs c when it is left out costs c·D_w at w half bits an entry (`trellis.DISTORTION`), so the next half bit
gains c·2(D_w − D_{w+1}) for a bit of each entry. Rows get all bits whose gain reaches the multiplier θ: with log costs
in the unit 2^(1/UNIT), all of it integers,

    width = the largest w with log c − log θ >= τ_w,    τ_w = −log 2(D_{w−1} − D_w),   the first bit given as a whole.

At high rates that is the classical b = ½ log₂(c / θ') (Cover and Thomas 2006, section 10.3.3).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from globe.quant.packing import row_bytes
from globe.quant.trellis import DISTORTION, LEAST_WIDTH

UNIT = 256
"""Parts of a factor of 2 in costs."""
_GAINS = (
    1 - DISTORTION[LEAST_WIDTH],
    *(2 * (more - less) for more, less in itertools.pairwise(DISTORTION[LEAST_WIDTH:])),
)
THRESHOLDS = tuple(round(-UNIT * math.log2(gain)) for gain in _GAINS)
"""τ_w of w = LEAST_WIDTH to MAX_WIDTH; increasing."""
LOWEST, HIGHEST = -(2**15), 2**15 - 1
"""Log costs are kept within int16."""
LEAST_MULTIPLIER = LOWEST + 24 * UNIT
"""However large the budget, rows of zeros get no bits, for they would no longer be zero; 24: how far the cost of an
input may be above its expert's (`side.share_costs`)."""


def log_costs(costs: Tensor) -> Tensor:
    """log2(costs) in parts, int32; rows that cost nothing get the lowest. Raises `ValueError` for NaN and infinity."""
    if not bool(costs.isfinite().all()):
        raise ValueError("costs of leaving out rows are not finite")
    found = costs.double().clamp_min(2.0 ** (LOWEST / UNIT)).log2() * UNIT
    return found.round().clamp(LOWEST, HIGHEST).to(torch.int32)


def widths_at(costs: Tensor, multiplier: int) -> Tensor:
    """Widths, uint8, of rows with log costs int32 at log multiplier log θ."""
    thresholds = torch.tensor(THRESHOLDS, dtype=torch.int32, device=costs.device)
    steps = torch.bucketize(costs - multiplier, thresholds, out_int32=True, right=True)
    return torch.where(steps > 0, steps + LEAST_WIDTH - 1, 0).to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one length that get their bits by one multiplier with all others."""

    costs: Tensor
    """Log costs of leaving a row out, per entry, int32, of any shape; of shared rows the sums."""
    length: int
    """K: entries of a row."""

    def num_bytes(self, multiplier: int) -> int:
        """Bytes of all rows' payload at a log multiplier."""
        return int(row_bytes(widths_at(self.costs, multiplier), self.length).sum())

    def loss(self, stakes: Tensor, multiplier: int) -> float:
        """What is lost at a log multiplier of rows that are worth the stakes, of the costs' shape."""
        widths = widths_at(self.costs, multiplier).long()
        return float((stakes.double() * torch.tensor(DISTORTION, dtype=torch.float64)[widths]).sum())


@dataclasses.dataclass(frozen=True)
class Filled:
    """What a budget buys."""

    multiplier: int
    """log θ."""
    num_bytes: int
    """Of the rows' payload; not above the budget."""
    spare: int
    """Bytes of the budget that no row gets at this multiplier."""


def water_fill(groups: Sequence[Rows], budget: int) -> Filled:
    """The least multiplier at which the payload of all rows takes at most `budget` bytes; by bisection.

    Raises `ValueError` for a negative budget.
    """
    if budget < 0:
        raise ValueError(f"rows cannot take {budget} bytes")
    low, high = LEAST_MULTIPLIER - 1, HIGHEST + 1  # low: all rows but zeros have MAX_WIDTH; high: all have none
    while high - low > 1:
        middle = (low + high) // 2
        taken = sum(group.num_bytes(middle) for group in groups)
        low, high = (middle, high) if taken > budget else (low, middle)
    taken = sum(group.num_bytes(high) for group in groups)
    return Filled(high, taken, budget - taken)
