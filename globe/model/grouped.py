"""One product for each expert on its own run of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def grouped_mm(states: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """(T, K), (n, K, N) -> (T, N): rows up to ends[0] times weights[0], from there to ends[1] times weights[1], …

    `ends` (n,) is int32 and ends with T. One call where PyTorch has a kernel for the operands, a loop of the same
    products elsewhere and where gradients are wanted.
    """
    if _has_kernel(states, weights):
        return functional.grouped_mm(states, weights, offs=ends)
    starts, stops = [0, *ends.tolist()[:-1]], ends.tolist()
    hit = [(start, stop, weight) for start, stop, weight in zip(starts, stops, weights, strict=True) if stop > start]
    return torch.cat([states[start:stop] @ weight for start, stop, weight in hit])


def _has_kernel(states: Tensor, weights: Tensor) -> bool:
    if torch.is_grad_enabled() or torch.is_autocast_enabled(states.device.type) or not len(states):
        return False
    if states.dtype != weights.dtype or states.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if states.is_cuda and torch.cuda.get_device_capability(states.device) < (8, 0):
        return False
    aligned = all(stride * states.element_size() % 16 == 0 for stride in (states.stride(0), _row_stride(weights)))
    return aligned and states.data_ptr() % 16 == 0 and hasattr(functional, "grouped_mm")


def _row_stride(weights: Tensor) -> int:
    """Of a stack of matrices that are contiguous, or transposed from contiguous ones."""
    return max(weights.stride()[1:])
