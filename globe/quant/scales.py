"""Scales on a grid of powers of 2^(1/6), the same float32 on every machine.

The scale of a row is about its root mean square; the step of its trellis, by which levels are multiplied, follows from
scale and width. Half a step of the grid off costs 1 % of the error at 3 bits and 2 % at 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from globe.quant.trellis import GAIN, RMS

PER_OCTAVE = 6
"""Scale exponent k stands for 2^(k / PER_OCTAVE)."""

_ROOTS = tuple(2 ** (k / PER_OCTAVE) for k in range(PER_OCTAVE))
_STEP_PER_SCALE = tuple(gain / RMS for gain in GAIN)


def nearest_exponents(rms: Tensor) -> Tensor:
    """Exponents, int32, of the scales nearest to `rms`; the least for 0."""
    tiny = torch.finfo(torch.float32).tiny
    return (rms.float().clamp_min(tiny).log2() * PER_OCTAVE).round().to(torch.int32)


def scales(exponents: Tensor) -> Tensor:
    """2^(k / PER_OCTAVE), float32, exactly rounded: a table for the fraction, and a power of two."""
    whole = exponents.div(PER_OCTAVE, rounding_mode="floor").to(torch.int32)
    roots = torch.tensor(_ROOTS, dtype=torch.float32, device=exponents.device)
    return torch.ldexp(roots[(exponents - whole * PER_OCTAVE).long()], whole)


def steps(exponents: Tensor, widths: Tensor) -> Tensor:
    """What one unit of a level is worth, float32, in rows with these scale exponents and widths."""
    per_scale = torch.tensor(_STEP_PER_SCALE, dtype=torch.float32, device=widths.device)
    return scales(exponents) * per_scale[widths.long()]
