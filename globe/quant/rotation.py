"""The rotation in which experts are coded: it spreads the large entries of a row over the whole of it.

Any orthogonal matrix on the outputs leaves tr(Δᵀ C Δ) as it is, and rows whose entries are sums of many are nearer to
normal than trained ones, which have outliers; a trellis is made for normal ones (QuIP#, Tseng et al. 2024, arXiv
2402.04396). Signs, then Hadamard matrices of the largest power of two that divides the outputs, on blocks next to each
other. Sums and differences of float32 and one product, in a fixed order: the same bits on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HASH = 2654435761
"""Knuth's multiplicative hash: output k has the sign of the highest bit of _HASH·(k + 1) mod 2³²."""


def block_length(num_outputs: int) -> int:
    """The largest power of two that divides the outputs."""
    return num_outputs & -num_outputs


def rotate(x: Tensor) -> Tensor:
    """Outputs (..., K), rotated; a new tensor."""
    return _hadamard(x * _signs(x))


def rotate_back(x: Tensor) -> Tensor:
    """The inverse."""
    return _hadamard(x).mul_(_signs(x))


def _signs(x: Tensor) -> Tensor:
    places = torch.arange(1, x.shape[-1] + 1, dtype=torch.int64, device=x.device)
    return (1 - 2 * ((places * _HASH >> 31) & 1)).to(x.dtype)


def _hadamard(x: Tensor) -> Tensor:
    """Every block by the symmetric orthogonal Hadamard matrix, in as many passes as its length has bits."""
    shape, K = x.shape, x.shape[-1]
    length = block_length(K)
    step = 1
    while step < length:
        left, right = x.reshape(-1, K // (2 * step), 2, step).unbind(2)
        x = torch.stack([left + right, left - right], 2)
        step *= 2
    return (x * length**-0.5).view(shape)
