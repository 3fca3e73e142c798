"""Between a checkpoint's tensors and the stacks of expert matrices, (E, P, D) per family, that are fitted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from globe.checkpoint.header import TORCH_DTYPES
from globe.checkpoint.layout import FAMILIES, ExpertLayer, Family, source_names
from globe.checkpoint.reader import Checkpoint
from globe.errors import CheckpointError


def read_family(checkpoint: Checkpoint, layer: ExpertLayer, family: Family) -> Tensor:
    """The family's experts, (E, P, D), contiguous and in the source's dtype; `down` is transposed.

    Raises `CheckpointError` naming the source tensor that holds a NaN or an infinity.
    """
    shape = (layer.num_experts, layer.intermediate_size, layer.hidden_size)
    stack = torch.empty(shape, dtype=TORCH_DTYPES[layer.dtype])
    names = source_names(layer, family)
    if layer.layout == "fused":
        stack.copy_(_of_fused(checkpoint.read(names[0]), family))
        check_finite(stack, names[0])
        return stack
    for expert, (name, matrix) in zip(stack, checkpoint.read_many(names), strict=True):
        check_finite(matrix, name)
        expert.copy_(matrix.T if family == "down" else matrix)
    return stack


def dense_tensor(layer: ExpertLayer, name: str, stacks: Mapping[Family, Tensor]) -> Tensor:
    """The inverse: the tensor that the source calls `name`, contiguous, in its shape and the stacks' dtype.

    Args:
        layer: where the name belongs.
        name: one of the layer's `source_names`; anything else is a `KeyError`.
        stacks: (E, P, D) of the families that the tensor holds, at least.
    """
    if layer.layout == "fused":
        if name == source_names(layer, "down")[0]:
            return stacks["down"].transpose(1, 2).contiguous()
        if name == source_names(layer, "gate")[0]:
            return torch.cat([stacks["gate"], stacks["up"]], dim=1)
        raise KeyError(name)
    family, expert = _places(layer)[name]
    matrix = stacks[family][expert]
    return (matrix.T if family == "down" else matrix).contiguous()


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise `CheckpointError` naming the tensor if it holds a NaN or an infinity."""
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # both are NaN if any element is; no mask of the tensor's size is made
    if not (torch.isfinite(low) and torch.isfinite(high)):
        found = "NaN" if torch.isnan(low) else "infinite values"
        raise CheckpointError(f"tensor {name} holds {found}: the checkpoint is damaged or its training diverged")


def _of_fused(tensor: Tensor, family: Family) -> Tensor:
    if family == "down":
        return tensor.transpose(1, 2)
    gate, up = tensor.chunk(2, dim=1)
    return gate if family == "gate" else up


def _places(layer: ExpertLayer) -> dict[str, tuple[Family, int]]:
    return {name: (family, expert) for family in FAMILIES for expert, name in enumerate(source_names(layer, family))}
