"""Dequantisation against transformers' own functions; of packed integers, against the arithmetic of its description."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from globe.checkpoint.packed import pack_int, unpack_fp8, unpack_int, unpack_mxfp4

RNG = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("shape", [(32, 64), (3, 32, 64), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_of_whole_blocks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=RNG).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], shape[-2] // 16, shape[-1] // 16, generator=RNG) + 0.01
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
    assert torch.equal(unpack_fp8(weight, scale, (16, 16), dtype), expected)


@pytest.mark.parametrize("shape", [(18, 16), (16, 33), (5, 7), (40, 50)])
def test_fp8_with_smaller_blocks_at_the_edges(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=RNG).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 16), -(-shape[1] // 16), generator=RNG)
    expected = _dequantize_fp8_weight(weight, scale, [16, 16], torch.float32)
    assert torch.equal(unpack_fp8(weight, scale, (16, 16), torch.float32), expected)


def test_fp8_scales_may_be_powers_of_two_alone() -> None:
    weight = torch.randn(32, 32, generator=RNG).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.25, 4.0], [1.0, 2.0**-20]]).to(torch.float8_e8m0fnu)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert torch.equal(unpack_fp8(weight, scale, (16, 16), torch.bfloat16), expected)


def test_mxfp4_of_every_byte_and_many_exponents() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16)
    scales = torch.randint(60, 190, (1, 4, 4), generator=RNG).to(torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)  # (1, 128, 4), bfloat16
    assert torch.equal(unpack_mxfp4(blocks, scales, torch.bfloat16).transpose(1, 2), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_at_every_place(bits: int) -> None:
    count, half, per = 1 << bits, 1 << bits - 1, 32 // bits
    numbers = torch.stack([torch.arange(count).roll(turn) - half for turn in range(16)])
    words = torch.zeros(16, count // per, dtype=torch.int64)
    for row in range(16):
        for column in range(count):
            words[row, column // per] |= (int(numbers[row, column]) + half) << bits * (column % per)
    packed = torch.where(words >= 2**31, words - 2**32, words).int()
    assert torch.equal(pack_int(numbers.to(torch.int8), bits), packed)
    scale = torch.rand(16, 4, generator=RNG).bfloat16()
    expected = numbers.bfloat16() * scale.repeat_interleave(count // 4, dim=1)
    assert torch.equal(unpack_int(packed, scale, bits, torch.bfloat16), expected)
