"""Weights as they are stored in block FP8, MXFP4 and packed int4 or int8, and the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from globe.errors import CheckpointError

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


def _unpack_experts(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(E, N, G, 16), (E, N, G) -> (E, 32·G, N), as gpt-oss' unquantised experts lie; an expert at a time."""
    E, N, G, _ = blocks.shape
    experts = torch.empty(E, 32 * G, N, dtype=dtype)
    for expert, own_blocks, own_scales in zip(experts, blocks, scales, strict=True):
        expert.copy_(unpack_mxfp4(own_blocks, own_scales, dtype).T)
    return experts


def unpack_int(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """compressed-tensors' pack-quantized, symmetric: runs of a row's numbers under one scale.

    Args:
        packed: (N, K·bits/32) int32, 32/bits numbers in each, the lowest bits first, 2^(bits−1) added to make them
            unsigned.
        scale: (N, K/g).
        bits: a divisor of 32.
        dtype: of the result, (N, K).
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    unsigned = ((packed.unsqueeze(-1) >> shifts) & (1 << bits) - 1).flatten(-2)
    numbers = unsigned.float() - (1 << bits - 1)
    return (numbers.unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def _unpack_linear(packed: Tensor, scale: Tensor, shape: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
    matrix = unpack_int(packed, scale.reshape(len(packed), -1), bits, dtype)
    if tuple(shape.tolist()) != matrix.shape:
        raise CheckpointError(
            f"a packed matrix holds {tuple(matrix.shape)} numbers and says {tuple(shape.tolist())}: rows that do not "
            "fill whole words are not supported"
        )
    return matrix


UNPACK: Mapping[str, Callable[..., Tensor]] = {
    "fp8": unpack_fp8,
    "mxfp4": _unpack_experts,
    "compressed-tensors": _unpack_linear,
}
"""From the stored parts of a tensor, `dtype` and what config.json says, by the method that it names, to the tensor."""


def pack_int(numbers: Tensor, bits: int) -> Tensor:
    """The inverse of the packing: numbers (…, K) from −2^(bits−1) to int32 (…, K·bits/32); K fills whole words."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    unsigned = numbers.int() + (1 << bits - 1)
    return (unsigned.unflatten(-1, (-1, len(shifts))) << shifts).sum(-1, dtype=torch.int32)


def packed_matrix(name: str, numbers: Tensor, scales: Tensor, bits: int) -> dict[str, Tensor]:
    """What is stored of the matrix `name` (…weight): numbers (rows, columns) and scales (rows, columns / size)."""
    return {
        f"{name}_packed": pack_int(numbers, bits),
        f"{name}_scale": scales.contiguous(),
        f"{name}_shape": torch.tensor(numbers.shape),
    }
