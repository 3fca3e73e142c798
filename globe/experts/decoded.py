"""What the coded experts of a family decode to."""

from __future__ import annotations

from pathlib import Path

import torch

from globe.experts.on_disk import Stack, empty_stack
from globe.quant.banked import BankedExperts
from globe.quant.threads import split
from globe.terms import Family

_AT_ONCE = 1 << 25
"""Weights that are decoded at once, in float32."""


def decoded(family: Family, coded: BankedExperts, dtype: torch.dtype, scratch: Path | None = None) -> Stack:
    """Coded experts (E, P, D), rounded to a dtype; where they are large, in the folder `scratch`, if there is one."""
    E, N = coded.rest.side.widths().shape
    K = coded.rest.num_outputs
    found = empty_stack((E, N, K) if family == "down" else (E, K, N), dtype, scratch)
    for part in split(E, -(-E * N * K // _AT_ONCE)):
        some = coded.decode(torch.arange(part.start, part.stop)).to(dtype)
        found[part] = some if family == "down" else some.mT
    return found
