"""Rows of different widths in one string of bytes, and back.

Expert after expert, input after input, a row of K symbols of w half bits takes ⌈K·w / 16⌉ bytes; bit j of a row is bit
j mod 8 of its byte ⌊j / 8⌋. Where everything lies follows from the widths, so nothing but the symbols is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from globe.quant import trellis

CHUNK = 2**20
"""Entries that are packed or unpacked at a time, each of their bits in an integer of 8 bytes."""


def row_bytes(widths: Tensor, length: int) -> Tensor:
    """Bytes of rows of `length` entries, an even number, with the given widths, int64, in their shape."""
    return (widths.long() * length + 14) // 16


def row_offsets(widths: Tensor, length: int) -> Tensor:
    """Where the rows of the given widths begin in a payload, int64, in their shape."""
    taken = row_bytes(widths, length).flatten()
    return (taken.cumsum(0) - taken).view(widths.shape)


def pack(symbols: Tensor, widths: Tensor) -> Tensor:
    """The payload, uint8, of rows of symbols (..., K) uint8 of as many bits as their widths (...,) say."""
    length = symbols.shape[-1]
    rows, flat = symbols.reshape(-1, length), widths.flatten()
    offsets = row_offsets(flat, length)
    payload = torch.zeros(int(row_bytes(flat, length).sum()), dtype=torch.uint8, device=symbols.device)
    places = torch.arange(8, dtype=torch.uint8, device=symbols.device)
    for width, some in rows_by_width(flat, length):
        bits = _bits(trellis.pairs(rows[some], width), width).to(torch.uint8).flatten(1)
        bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).view(len(some), -1, 8)
        packed = (bits << places).sum(2, dtype=torch.uint8)
        payload[offsets[some, None] + torch.arange(packed.shape[1], device=payload.device)] = packed
    return payload


def unpack(payload: Tensor, widths: Tensor, length: int) -> Tensor:
    """The symbols (..., K), uint8, that `pack` was given; 0 in rows of width 0."""
    flat = widths.flatten()
    offsets = row_offsets(flat, length)
    rows = torch.zeros(len(flat), length, dtype=torch.uint8, device=payload.device)
    for width, some in rows_by_width(flat, length):
        rows[some] = _symbols(payload, offsets[some], width, length)
    return rows.view(*widths.shape, length)


def decode(payload: Tensor, offsets: Tensor, widths: Tensor, steps: Tensor, length: int) -> Tensor:
    """The rows (n, K), float32, that begin at `offsets` (n,) of a payload: level times step, 0 in rows of width 0.

    widths (n,) uint8, steps (n,) float32. Integers up to the one product, hence the same bits on every machine.
    """
    out = torch.zeros(len(offsets), length, device=payload.device)
    kernels = trellis.compiled()
    if kernels is not None and payload.device.type == "cpu":
        rows = (x.contiguous().numpy() for x in (payload, offsets, widths, steps))
        kernels.decode_block(*rows, length, 0, length, out.numpy())
        return out
    levels = trellis.levels(payload.device)
    for width, some in rows_by_width(widths, length):
        states = trellis.states(_symbols(payload, offsets[some], width, length), width)
        out[some] = levels[states].float() * steps[some, None]
    return out


def rows_by_width(widths: Tensor, length: int) -> Iterator[tuple[int, Tensor]]:
    """Each width above 0 among `widths` (n,) with the rows (m,) that have it, a few million entries at a time."""
    most = max(1, CHUNK // length)
    counts = torch.bincount(widths, minlength=trellis.MAX_WIDTH + 1)
    for width in range(trellis.LEAST_WIDTH, trellis.MAX_WIDTH + 1):
        if not counts[width]:
            continue
        rows = torch.where(widths == width)[0]
        for start in range(0, len(rows), most):
            yield width, rows[start : start + most]


def _symbols(payload: Tensor, offsets: Tensor, width: int, length: int) -> Tensor:
    """Symbols (n, K) of rows of one width that begin at `offsets` (n,)."""
    num_bytes, first = (length * width + 14) // 16, trellis.entry_bits(width)[0]
    packed = payload[offsets[:, None] + torch.arange(num_bytes, device=payload.device)]
    bits = _bits(packed, 8).flatten(1)[:, : length * width // 2].view(len(offsets), length // 2, width).int()
    two = (bits << torch.arange(width, dtype=torch.int32, device=payload.device)).sum(2, dtype=torch.int32)
    return torch.stack([two & ((1 << first) - 1), two >> first], 2).flatten(1).to(torch.uint8)


def _bits(x: Tensor, count: int) -> Tensor:
    """The lowest bits of integers (...), the lowest first: (..., count)."""
    return (x[..., None] >> torch.arange(count, dtype=x.dtype, device=x.device)) & 1
