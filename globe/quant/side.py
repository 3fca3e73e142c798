"""What is stored beside the paths: widths and scales, of every row by itself or shared by experts and inputs.

Twelve bits for each row are 12/K bits an entry: little where rows are long, and much where they have 48 entries. Where
all experts have the same inputs (gate and up), width and scale are products of one number for each expert and one for
each input, hence sums of logarithms, and cost next to nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from globe.quant.scales import PER_OCTAVE
from globe.quant.sizes import side_bytes
from globe.quant.trellis import LEAST_WIDTH
from globe.quant.water_fill import HIGHEST, LOWEST, UNIT, log_costs, widths_at

LARGEST_SCALE = 255
"""Steps by which the scale of a row of its own can be below its expert's base: 42 octaves."""
HEADROOM = 2 * PER_OCTAVE
"""Steps from the largest scale that is expected to the base."""


@dataclasses.dataclass(frozen=True)
class OwnRows:
    """Four bits for the width of each row, 0 where it is left out, and a byte for its scale."""

    packed_widths: Tensor
    """(E, ⌈N/2⌉) uint8: of two rows each, the first in the lower half; 0, or the width less LEAST_WIDTH − 1."""
    scales: Tensor
    """(E, N) uint8: how far scale exponents are below the expert's; 0 where the width is."""
    bases: Tensor
    """(E,) int16: scale exponents."""

    @classmethod
    def of(cls, widths: Tensor, exponents: Tensor, bases: Tensor) -> OwnRows:
        """From widths (E, N) uint8, scale exponents (E, N) int32 within reach of the bases, and these."""
        steps = torch.where(widths > 0, widths - (LEAST_WIDTH - 1), 0)
        both = torch.nn.functional.pad(steps, (0, steps.shape[1] % 2)).view(len(steps), -1, 2)
        scales = torch.where(widths > 0, bases[:, None].int() - exponents, 0).to(torch.uint8)
        return cls((both[..., 0] | both[..., 1] << 4).to(torch.uint8), scales, bases)

    def widths(self) -> Tensor:
        """(E, N) uint8."""
        both = torch.stack([self.packed_widths & 15, self.packed_widths >> 4], 2)
        steps = both.flatten(1)[:, : self.scales.shape[1]]
        return torch.where(steps > 0, steps + (LEAST_WIDTH - 1), 0)

    def exponents(self) -> Tensor:
        """Scale exponents (E, N), int32; of no meaning where the width is 0."""
        return self.bases[:, None].int() - self.scales.int()

    @property
    def num_bytes(self) -> int:
        """Stored."""
        return side_bytes(*self.scales.shape, is_shared=False)

    @classmethod
    def cat(cls, parts: Sequence[OwnRows]) -> OwnRows:
        """Those of experts one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(cls)))

    def __getitem__(self, experts: Tensor) -> OwnRows:
        return OwnRows(self.packed_widths[experts], self.scales[experts], self.bases[experts])


@dataclasses.dataclass(frozen=True)
class SharedRows:
    """Log cost over multiplier, and scale exponent, as sums of a number of the expert's and one of the input's."""

    expert_costs: Tensor
    """(E,) int16: log costs less the log multiplier."""
    input_costs: Tensor
    """(N,) int16."""
    expert_scales: Tensor
    """(E,) int16: scale exponents."""
    input_scales: Tensor
    """(N,) int8."""

    def widths(self) -> Tensor:
        """(E, N) uint8."""
        return widths_at(self.expert_costs[:, None].int() + self.input_costs.int(), 0)

    def exponents(self) -> Tensor:
        """Scale exponents (E, N), int32."""
        return self.expert_scales[:, None].int() + self.input_scales.int()

    @property
    def num_bytes(self) -> int:
        """Stored."""
        return side_bytes(len(self.expert_costs), len(self.input_costs), is_shared=True)

    def __getitem__(self, experts: Tensor) -> SharedRows:
        return dataclasses.replace(
            self, expert_costs=self.expert_costs[experts], expert_scales=self.expert_scales[experts]
        )


def parts_of_side(side: OwnRows | SharedRows) -> list[Tensor]:
    """Its tensors, in the order of its fields."""
    return [getattr(side, field.name) for field in dataclasses.fields(side)]


def side_of_parts(parts: Sequence[Tensor]) -> OwnRows | SharedRows:
    """The inverse."""
    return OwnRows(*parts) if len(parts) == len(dataclasses.fields(OwnRows)) else SharedRows(*parts)


@dataclasses.dataclass(frozen=True)
class SharedCosts:
    """Log costs that are sums, as `SharedRows` stores them, before the multiplier is known."""

    experts: Tensor
    """(E,) int32."""
    inputs: Tensor
    """(N,) int32, within int16."""

    def total(self) -> Tensor:
        """(E, N) int32."""
        return self.experts[:, None] + self.inputs


def fit_sum(x: Tensor, weights: Tensor | None = None, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """u (E,) and v (N,), v of mean 0, that minimise Σ w_ei (x_ei − u_e − v_i)², by alternation; w = 1 by default."""
    if weights is None:
        u = x.mean(1)
        return u, x.mean(0) - u.mean()
    weights = weights + 1e-6  # an expert or an input without weight gets what the others suggest
    v = torch.zeros_like(x[0])
    u = x[:, 0]
    for _ in range(rounds):
        u = ((x - v) * weights).sum(1) / weights.sum(1)
        v = ((x - u[:, None]) * weights).sum(0) / weights.sum(0)
        v = v - v.mean()
    return u, v


def misfit(costs: Tensor, mean_squares: Tensor) -> float:
    """Bits an entry that rows lose by sharing widths and scales: how far log costs and log mean squares (E, N) are from
    sums of a number of the expert's and one of the input's.

    To second order: a width that is δ off on average costs ½ ln 4 δ² bits, and a scale that is δ octaves off 1.6 δ².
    """
    energies = log_costs(mean_squares)

    def scatter(x: Tensor) -> float:
        octaves = x.double() / (2 * UNIT)  # costs and energies are squares
        experts, inputs = fit_sum(octaves)
        return float((octaves - experts[:, None] - inputs).square().mean())

    return 0.5 * math.log(4) * scatter(costs) + 1.6 * scatter(energies)


def share_costs(costs: Tensor) -> SharedCosts:
    """The sums nearest to log costs (E, N) in the least-squares sense."""
    u, v = fit_sum(costs.double())
    half = 8 * UNIT  # no input's cost is taken for more than 2^±24 of another's
    v = v.round().clamp(-3 * half, 3 * half)
    return SharedCosts(u.round().to(torch.int32), v.to(torch.int32))


def share_rows(costs: SharedCosts, multiplier: int, exponents: Tensor) -> SharedRows:
    """What is stored for rows that scales with exponents (E, N) are expected to suit when they are coded."""
    expert_costs = (costs.experts - multiplier).clamp(LOWEST, HIGHEST).to(torch.int16)
    widths = widths_at(expert_costs[:, None].int() + costs.inputs, 0)
    u, v = fit_sum(exponents.double(), (widths > 0).double())
    return SharedRows(
        expert_costs,
        costs.inputs.to(torch.int16),
        u.round().to(torch.int16),
        v.round().clamp(-128, 127).to(torch.int8),
    )
