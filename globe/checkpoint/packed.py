"""Weights as they are stored in block FP8, MXFP4 and packed int4, and the numbers that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS = 127


def unpack_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """DeepSeek-V3's block FP8: each block of a matrix times its own scale, computed in float32 and rounded once.

    Args:
        weight: (…, N, K) float8.
        scale: (…, ⌈N/n⌉, ⌈K/k⌉), what the files call `weight_scale_inv`.
        block: (n, k).
        dtype: of the result, (…, N, K).
    """
    *_, rows, columns = weight.shape
    wide = scale.float().repeat_interleave(block[0], -2)[..., :rows, :]
    wide = wide.repeat_interleave(block[1], -1)[..., :columns]
    return wide.mul_(weight.float()).to(dtype)


def unpack_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP4 (OCP Microscaling Formats 1.0): runs of 32 numbers of 4 bits (E2M1) under one power of two (E8M0).

    Args:
        blocks: (…, G, 16) uint8, two numbers in a byte, the low half first.
        scales: (…, G) uint8, exponents with a bias of 127.
        dtype: of the result, (…, 32·G); exact in bfloat16 and wider.
    """
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32)
    both = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    numbers = torch.ldexp(values[both.int()], scales.int().unsqueeze(-1) - _E8M0_BIAS)
    return numbers.flatten(-2).to(dtype)


def unpack_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """compressed-tensors' pack-quantized, 4 bits, symmetric: runs of a row's numbers under one scale.

    Args:
        packed: (N, K/8) int32, eight numbers in each, the lowest bits first, 8 added to make them unsigned.
        scale: (N, K/g).
        dtype: of the result, (N, K).
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    numbers = ((packed.unsqueeze(-1) >> shifts) & 15).flatten(-2).float() - 8
    return (numbers.unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)
