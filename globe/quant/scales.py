"""Scales on a grid of powers of 2^(1/6), the same float32 on every machine.

The scale of a row is about its root mean square; the step of its trellis, by which levels are multiplied, follows from
scale and width. Half a step of the grid off costs 1 % of the error at 3 bits and 2 % at 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from globe.quant.trellis import DISTORTION, GAIN, LARGEST, RMS

PER_OCTAVE = 6
"""Scale exponent k stands for 2^(k / PER_OCTAVE)."""

_TRIED = 3 * PER_OCTAVE
_REACH, _WITHIN = 0.9, 0.7
"""Of the largest level, what a path reaches without detours; of the loss of a normal row, what is within the levels.
Fitted on normal rows, on rows of a trained model and on rows of Student's t distribution with 5 degrees of freedom."""
_ROOTS = tuple(2 ** (k / PER_OCTAVE) for k in range(PER_OCTAVE))
_STEP_PER_SCALE = tuple(gain / RMS for gain in GAIN)


def nearest_exponents(rms: Tensor) -> Tensor:
    """Exponents, int32, of the scales nearest to `rms`; the least for 0."""
    tiny = torch.finfo(torch.float32).tiny
    return (rms.float().clamp_min(tiny).log2() * PER_OCTAVE).round().to(torch.int32)


def fit_exponents(rows: Tensor, widths: Tensor) -> Tensor:
    """Exponents (n,), int32, of the scales that suit rows (n, K) with these widths (n,).

    The root mean square suits rows like a normal distribution. A row whose largest entries are beyond the largest level
    gets a larger scale, the least of: loss as for a normal row, which grows as the square of the scale, and what lies
    beyond the levels. At 6 bits and more a few such entries would cost more than all others.
    """
    mean_squares = rows.square().mean(1)
    found = nearest_exponents(mean_squares.sqrt())
    reach = _REACH * LARGEST * steps(found, widths)
    within = _WITHIN * torch.tensor(DISTORTION, device=rows.device)[widths.long()] * mean_squares
    growth = 2 ** (torch.arange(_TRIED, device=rows.device) / PER_OCTAVE)
    beyond = (rows.abs() - reach[:, None]).clamp_min(0).square().mean(1)
    who = torch.where((beyond > within * (growth[1] ** 2 - 1)) & (widths > 0))[0]  # no larger scale pays for others
    large = rows[who].abs()
    left = (large[:, None] - (reach[who, None] * growth)[..., None]).clamp_min(0).square().mean(2)
    found[who] += (within[who, None] * growth.square() + left).argmin(1).to(torch.int32)
    return found


def scales(exponents: Tensor) -> Tensor:
    """2^(k / PER_OCTAVE), float32, the same bits everywhere: a table for the fraction times an exact power of two.

    Exponents beyond the normal numbers of float32 give the least and the greatest power of two times the fraction.
    """
    whole = exponents.div(PER_OCTAVE, rounding_mode="floor").to(torch.int32)
    roots = torch.tensor(_ROOTS, dtype=torch.float32, device=exponents.device)
    powers = ((whole.clamp(-126, 127) + 127) << 23).view(torch.float32)
    return roots[(exponents - whole * PER_OCTAVE).long()] * powers


def steps(exponents: Tensor, widths: Tensor) -> Tensor:
    """What one unit of a level is worth, float32, in rows with these scale exponents and widths."""
    per_scale = torch.tensor(_STEP_PER_SCALE, dtype=torch.float32, device=widths.device)
    return scales(exponents) * per_scale[widths.long()]
