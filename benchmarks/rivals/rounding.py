"""Rounding of the weights alone to b bits, in groups with a scale and an offset of 16 bits each.

    Ŵ = offset + scale · round((W − offset) / scale),   offset = min, scale = (max − min) / (2^b − 1) over the group

That is b + 1 bits for a weight in groups of 32. A group is neighbours along the hidden dimension, in every family.
"""

from __future__ import annotations

import time

from torch import Tensor

from benchmarks.stacks import Approximation, Stacks
from globe.errors import SettingsError

GROUP = 32
"""Weights of a group, unless another number is given."""


def bits_of_a_weight(bits: int, group: int = GROUP) -> float:
    """What a weight rounded to `bits` takes, its share of the scale and the offset included."""
    return bits + 2 * 16 / group


def in_groups(values: Tensor, group: int = GROUP) -> Tensor:
    """(…, N) as (…, N / group, group); raises `SettingsError` when the group does not divide N."""
    if values.shape[-1] % group:
        raise SettingsError(f"{values.shape[-1]} columns are no whole number of groups of {group}")
    return values.unflatten(-1, (-1, group))


def grid(groups: Tensor, bits: int, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and offset (…, 1), of half precision but in float32, for groups (…, N); `shrink` narrows their range."""
    low, high = groups.amin(-1, keepdim=True) * shrink, groups.amax(-1, keepdim=True) * shrink
    scale = ((high - low) / (2**bits - 1)).clamp_min(2.0**-24)  # the smallest positive number of half precision
    return scale.half().float(), low.half().float()


def round_to(values: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """The nearest point of the grid."""
    return offset + scale * ((values - offset) / scale).round().clamp(0, 2**bits - 1)


def rounding(stacks: Stacks, bits: int, group: int = GROUP) -> Approximation:
    """Round every weight to the nearest point of its group's grid."""
    began, approximation = time.monotonic(), {}
    for key, experts in stacks.items():
        groups = in_groups(experts, group)
        approximation[key] = round_to(groups, *grid(groups, bits), bits).flatten(-2)
    return rounded(approximation, group, began)


def rounded(approximation: Stacks, group: int, began: float) -> Approximation:
    """Weights that are all stored, in `bits_of_a_weight`, and the time since `began`."""
    stored = sum(experts.numel() for experts in approximation.values())
    return Approximation(approximation, stored, f"groups of {group}", time.monotonic() - began)
