"""Between a checkpoint's tensors and the stacks of expert matrices, (E, P, D) per family, that are fitted."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.checkpoint.gate_up import fuse_gate_up, split_gate_up
from globe.checkpoint.layout import ExpertLayer, source_names
from globe.checkpoint.reader import Checkpoint
from globe.errors import CheckpointError
from globe.terms import FAMILIES, Family


def read_family(checkpoint: Checkpoint, layer: ExpertLayer, family: Family, experts: slice = slice(None)) -> Tensor:
    """The family's experts, or some next to each other, (E, P, D), contiguous and in the source's dtype; `down` is
    transposed.

    Raises `CheckpointError` naming the source tensor that holds a NaN or an infinity.
    """
    numbers = range(layer.num_experts)[experts]
    stack = torch.empty(len(numbers), layer.intermediate_size, layer.hidden_size, dtype=TORCH_DTYPES[layer.dtype])
    names = source_names(layer, family)
    if layer.layout == "fused":
        stack.copy_(_of_fused(layer, checkpoint.read(names[0]), family)[experts])
        check_finite(stack, names[0])
        return stack
    for expert, (name, matrix) in zip(stack, checkpoint.read_many(names[numbers.start : numbers.stop]), strict=True):
        check_finite(matrix, name)
        expert.copy_(matrix.T if family == "down" else matrix)
    return stack


def read_expert(
    checkpoint: Checkpoint, layer: ExpertLayer, expert: int, families: Iterable[Family]
) -> dict[Family, Tensor]:
    """The matrices (P, D) of one expert by family, in dtypes of the source; `down` is transposed."""
    names: dict[Family, list[str]] = {family: source_names(layer, family) for family in families}
    if layer.layout == "fused":
        return {family: _of_fused(layer, checkpoint.read(name), family)[expert] for family, (name, *_) in names.items()}
    read = checkpoint.read_many(each[expert] for each in names.values())
    return {family: matrix.T if family == "down" else matrix for family, (_, matrix) in zip(names, read, strict=True)}


class Matrices(Protocol):
    """The experts of a family (E, P, D), in memory or elsewhere."""

    def __getitem__(self, experts: int | slice, /) -> Tensor: ...


def dense_tensor(layer: ExpertLayer, name: str, stacks: Mapping[Family, Matrices]) -> Tensor:
    """The inverse: the tensor that the source calls `name`, contiguous, in its shape and the stacks' dtype.

    Args:
        layer: where the name belongs.
        name: one of the layer's `source_names`; anything else is a `KeyError`.
        stacks: (E, P, D) of the families that the tensor holds, at least.
    """
    if layer.layout == "fused":
        if name == source_names(layer, "down")[0]:
            down = stacks["down"][:]
            return down if layer.transposed else down.transpose(1, 2).contiguous()
        if name == source_names(layer, "gate")[0]:
            gate_up = _fuse(layer, stacks["gate"][:], stacks["up"][:])
            return gate_up.transpose(1, 2).contiguous() if layer.transposed else gate_up
        raise KeyError(name)
    family, expert = _places(layer)[name]
    if expert >= layer.num_experts:
        return torch.zeros_like(stacks[family][0])
    matrix = stacks[family][expert]
    return (matrix.T if family == "down" else matrix).contiguous()


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise `CheckpointError` naming the tensor if it holds a NaN or an infinity."""
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # both are NaN if any element is; no mask of the tensor's size is made
    if not (torch.isfinite(low) and torch.isfinite(high)):
        fault = "NaN" if torch.isnan(low) else "infinite values"
        raise CheckpointError(f"tensor {name} holds {fault}: the checkpoint is damaged or its training diverged")


def _of_fused(layer: ExpertLayer, tensor: Tensor, family: Family) -> Tensor:
    if family == "down":
        return tensor if layer.transposed else tensor.transpose(1, 2)
    gate_up = (tensor.transpose(1, 2) if layer.transposed else tensor)[: layer.num_experts]
    gate, up = split_gate_up(gate_up, 1, interleaved=layer.interleaved)
    return gate if family == "gate" else up


def _fuse(layer: ExpertLayer, gate: Tensor, up: Tensor) -> Tensor:
    """(E and the unused, 2P, D)."""
    both = fuse_gate_up(gate, up, 1, interleaved=layer.interleaved)
    return torch.cat([both, both.new_zeros(layer.num_unused, *both.shape[1:])]) if layer.num_unused else both


@functools.lru_cache(maxsize=1)
def _places(layer: ExpertLayer) -> dict[str, tuple[Family, int]]:
    return {name: (family, expert) for family in FAMILIES for expert, name in enumerate(source_names(layer, family))}
