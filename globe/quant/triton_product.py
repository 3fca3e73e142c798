"""Tokens times coded experts on a GPU, decoded in registers: the product of `globe.quant.product`, in Triton.

A program has some tokens of one expert and a block of outputs, and goes through the rows. Neither which experts have
tokens nor how many is read back to the host.
"""

# triton is not among the dependencies, and has no type stubs
# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from globe.quant import trellis
from globe.quant.coded import CodedExperts

_MULTIPLIER, _ADDEND = tl.constexpr(trellis.MULTIPLIER), tl.constexpr(trellis.ADDEND)
_MEAN, _LAST_STATE = tl.constexpr(trellis.MEAN), tl.constexpr(trellis.NUM_STATES - 1)
BLOCK_OUTPUTS, BLOCK_INPUTS = 64, 32


@triton.jit
def _bits(words, num_words, begin):
    """The 32 bits from bit `begin` on; words behind the last are 0."""
    word, shift = begin >> 5, (begin & 31).to(tl.uint64)
    low = tl.load(words + word, mask=word < num_words, other=0).to(tl.uint64)
    high = tl.load(words + word + 1, mask=word + 1 < num_words, other=0).to(tl.uint64)
    return ((low | high << 32) >> shift).to(tl.uint32)


@triton.jit
def _level(state):
    mixed = (state & _LAST_STATE) * _MULTIPLIER + _ADDEND
    pairs = (mixed & 0x00FF00FF) + ((mixed >> 8) & 0x00FF00FF)
    return ((pairs + (pairs >> 16)) & 0xFFFF).to(tl.int32) - _MEAN


@triton.jit
def _multiply(
    x, payload, offsets, widths, steps, experts, starts, ends, out,
    num_words, E, N, K, length,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert = tl.load(experts + tile)
    if expert >= E:
        return
    tokens = tl.load(starts + tile) + tl.arange(0, TOKENS)
    is_token = tokens < tl.load(ends + expert)
    pairs = tl.program_id(1) * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)  # of entries 2·p and 2·p + 1
    closes = (tl.program_id(1) + 1) * OUTPUTS + 13 > length  # as many entries at the end reach beyond it
    words = payload.to(tl.pointer_type(tl.uint32))  # one with a byte of the payload can be read as a whole
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for first in range(0, N, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        is_input = inputs < N
        rows = expert * N + inputs
        offset = tl.load(offsets + rows, mask=is_input, other=0)
        width = tl.load(widths + rows, mask=is_input, other=0).to(tl.int32)
        step = tl.where(width > 0, tl.load(steps + rows, mask=is_input, other=0.0), 0.0)
        row, behind = (words + (offset >> 2))[:, None], (num_words - (offset >> 2)).to(tl.int32)[:, None]
        ahead = ((offset & 3) * 8).to(tl.int32)[:, None]
        begin = pairs[None, :] * width[:, None]
        bits = _bits(row, behind, ahead + begin)
        if closes:
            left = tl.minimum(tl.maximum(length * width[:, None] // 2 - begin, 0), 31).to(tl.uint32)
            bits = tl.where(left < 25, (bits & ((1 << left) - 1)) | (_bits(row, behind, ahead) << left), bits)
        even, odd = _level(bits), _level(bits >> (width[:, None] >> 1).to(tl.uint32))
        decoded = tl.reshape(tl.join(even, odd), (INPUTS, OUTPUTS)).to(tl.float32) * step[:, None]
        places = tokens[:, None] * N + inputs[None, :]
        some = tl.load(x + places, mask=is_token[:, None] & is_input[None, :], other=0.0)
        total = tl.dot(some, decoded.to(some.dtype), total, input_precision="ieee")
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    places = tokens[:, None].to(tl.int64) * K + outputs[None, :]
    tl.store(out + places, total, mask=is_token[:, None] & (outputs < K)[None, :])


def multiply(x: Tensor, ends: Tensor, coded: CodedExperts, out: Tensor) -> None:
    """Every expert's rows of x (n, N) times its decoded rows, to out (n, K) float32; outputs are not rotated back.

    ends (E,): see `product.multiply`. Rows of out that belong to no expert are left as they are.
    """
    E, N, K = len(ends), x.shape[1], coded.num_outputs
    size = 16 if len(x) <= 16 * E else 64
    sizes = ends.diff(prepend=ends.new_zeros(1))
    tiles = (sizes + size - 1) // size
    last = tiles.cumsum(0)
    places = torch.arange(len(x) // size + E, device=x.device)  # as many tiles as there can be
    experts = torch.searchsorted(last, places, right=True)
    of = experts.clamp_max(E - 1)
    starts = ends[of] - sizes[of] + (places - last[of] + tiles[of]) * size
    rows = coded.rows()
    _multiply[len(places), triton.cdiv(K, BLOCK_OUTPUTS)](
        x.contiguous(), coded.payload, rows.offsets, rows.widths, rows.steps, experts, starts, ends, out,
        (coded.payload.numel() + 3) // 4, E, N, K, coded.length,
        TOKENS=size, OUTPUTS=BLOCK_OUTPUTS, INPUTS=BLOCK_INPUTS,
    )  # fmt: skip
