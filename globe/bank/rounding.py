"""Factors in few bits: levels, a scale for each group of a row, feedback of the error, and packing.

An entry is the nearest of 2^b evenly spaced levels, symmetric about zero, that reach to about the largest entry of its
group; at 8 bits zero is one of them. A scale is a power of 2^(1/8) and takes a byte.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from globe.bank.linalg import cholesky_of_inverse

GROUP = 64
"""Entries of a row that share a scale, at most."""
STEPS_PER_OCTAVE, SMALLEST_OCTAVE = 8, -24
"""Scale code u stands for 2^(SMALLEST_OCTAVE + u / STEPS_PER_OCTAVE); u = 0 for a scale of 0."""


CLIP = {8: 1.0, 5: 1.0, 4: 0.95, 3: 0.9, 2: 0.8}
"""By bits, the largest level over the largest entry of a group."""


def zero_point(bits: int) -> float:
    """The index that stands for 0: an entry is (index − zero_point) / (2^(b−1) − 1/2) of its scale, at 8 bits / 127."""
    return 128.0 if bits == 8 else (2**bits - 1) / 2


def steps_of_scale(bits: int) -> float:
    """Steps of the grid from 0 to a group's scale."""
    return 127.0 if bits == 8 else (2**bits - 1) / 2


def value(index: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The level of an index."""
    return (index - zero_point(bits)) / steps_of_scale(bits) * scale


def stored_shape(shape: tuple[int, ...], bits: int | None) -> tuple[int, ...]:
    """The shape in which a factor of `shape` is stored, encoded along its last dimension if `bits` are given."""
    return shape if bits is None else (*shape[:-1], num_bytes(shape[-1], bits))


def num_groups(columns: int) -> int:
    """Groups of a row; they are equally long, but for the last."""
    return -(-columns // GROUP)


def num_bytes(columns: int, bits: int) -> int:
    """Bytes of an encoded row: its entries, then its scales."""
    return -(-columns * bits // 8) + num_groups(columns)


def group_length(columns: int) -> int:
    """Entries of a group, a multiple of 8 where a row has several."""
    count = num_groups(columns)
    return columns if count == 1 else -(-columns // (8 * count)) * 8


def scale_codes(x: Tensor, bits: int) -> Tensor:
    """Codes (..., G) of the scales of rows (..., N), uint8."""
    length, columns = group_length(x.shape[-1]), x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % length)).view(*x.shape[:-1], -1, length)
    octaves = (CLIP[bits] * padded.abs().amax(-1)).log2()
    codes = (octaves - SMALLEST_OCTAVE) * STEPS_PER_OCTAVE
    codes = codes.ceil() if bits == 8 else codes.round()
    smallest = SMALLEST_OCTAVE - math.log2(4 * steps_of_scale(bits))  # half the least level: below it 0 is nearer
    return torch.where(octaves < smallest, 0, codes.clamp(1, 255)).to(torch.uint8)


def scales(codes: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The scale of every entry, (..., N), from the codes (..., G) of the groups."""
    exact = torch.exp2(codes.to(dtype) / STEPS_PER_OCTAVE + SMALLEST_OCTAVE) * (codes > 0)
    return exact.repeat_interleave(group_length(columns), dim=-1)[..., :columns]


def nearest(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Index of the level nearest to x, in the dtype of x."""
    unit = x / scale.clamp_min(torch.finfo(x.dtype).tiny)
    return (unit * steps_of_scale(bits) + zero_point(bits)).round_().clamp_(0, 2**bits - 1)


def round_nearest(x: Tensor, bits: int) -> Tensor:
    """Every entry of (..., N) as it is after encoding and decoding."""
    scale = scales(scale_codes(x, bits), x.shape[-1], x.dtype)
    return value(nearest(x, scale, bits), scale, bits)


def encode(x: Tensor, bits: int) -> Tensor:
    """Round to the nearest level and pack: (..., N) -> (..., num_bytes(N)), uint8."""
    codes = scale_codes(x, bits)
    return pack(nearest(x, scales(codes, x.shape[-1], x.dtype), bits), codes, bits)


def encode_with_feedback(x: Tensor, gram: Tensor, bits: int) -> Tensor:
    """Round column after column, the later ones making up for the error of the earlier; packed like `encode`.

    `x` A (E, P, R) minimises tr((A − X) H (A − X)ᵀ) for `gram` H (E, R, R), positive semidefinite. Each column's error
    is spread over the columns that are still to be rounded, in the least-squares sense (Frantar et al. 2022, GPTQ;
    Babai's nearest plane). Returns (E, P, num_bytes(R)).
    """
    columns, upper = x.shape[-1], cholesky_of_inverse(gram)
    length = group_length(columns)
    x, indices, codes = x.clone(), torch.empty_like(x), list[Tensor]()
    scale = x.new_empty(0)
    for column in range(columns):
        if column % length == 0:  # the scale of what the group has become by now
            codes.append(scale_codes(x[..., column : column + length], bits))
            scale = scales(codes[-1], 1, x.dtype)[..., 0]
        indices[..., column] = nearest(x[..., column], scale, bits)
        error = (x[..., column] - value(indices[..., column], scale, bits)) / upper[:, column, column, None]
        x[..., column + 1 :] -= error[..., None] * upper[:, None, column, column + 1 :]
    return pack(indices, torch.cat(codes, dim=-1), bits)


def pack(indices: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Indices (..., N) as a stream of b bits each, filled up to a byte, and the scales' codes (..., G) behind it."""
    indices = indices.to(torch.uint8)
    if bits == 8:
        return torch.cat([indices, codes], dim=-1)
    places = torch.arange(bits, dtype=torch.uint8, device=indices.device)
    stream = ((indices[..., None] >> places) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).view(*indices.shape[:-1], -1, 8)
    packed = (stream << torch.arange(8, dtype=torch.uint8, device=indices.device)).sum(-1, dtype=torch.uint8)
    return torch.cat([packed, codes], dim=-1)


def decode(encoded: Tensor, columns: int, bits: int, part: slice | None = None) -> Tensor:
    """The entries of encoded rows (..., num_bytes(N)) of N `columns`, float32; of the columns `part` alone if given.

    A part begins and ends at a multiple of 8, or at the end of the row.
    """
    start, stop, _ = (part or slice(None)).indices(columns)
    codes = encoded[..., -num_groups(columns) :]
    packed = encoded[..., start * bits // 8 : -(-stop * bits // 8)]
    if bits == 8:
        indices = packed
    else:
        stream = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=encoded.device)) & 1
        stream = stream.flatten(-2)[..., : (stop - start) * bits].reshape(*packed.shape[:-1], -1, bits)
        places = torch.arange(bits, dtype=torch.uint8, device=encoded.device)
        indices = (stream << places).sum(-1, dtype=torch.uint8)
    return value(indices.float(), scales(codes, columns)[..., start:stop], bits)


def decoded(factor: Tensor, columns: int, bits: int | None) -> Tensor:
    """A stored factor in float32: decoded if it is in few bits."""
    return factor.float() if bits is None else decode(factor, columns, bits)
