"""The one rule by which gate and up share a dimension: one after the other, or in turns."""

from __future__ import annotations

import torch
from torch import Tensor


def split_gate_up(both: Tensor, dim: int, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of gate and up along `dim`, which holds 2P: P of gate, then P of up, or the two in turns."""
    if interleaved:
        gate, up = both.unflatten(dim, (-1, 2)).unbind(dim + 1 if dim >= 0 else dim)
    else:
        gate, up = both.chunk(2, dim)
    return gate, up


def fuse_gate_up(gate: Tensor, up: Tensor, dim: int, *, interleaved: bool) -> Tensor:
    """The inverse, a new tensor."""
    if not interleaved:
        return torch.cat([gate, up], dim)
    dim = dim % gate.dim()
    return torch.stack([gate, up], dim + 1).flatten(dim, dim + 1)
