"""Which tensors of a checkpoint are routed experts, and how the files arrange them.

Two arrangements exist, under any prefix that ends in `layers.N.….experts`:

    per expert    experts.{i}.{gate_proj,up_proj,down_proj}.weight, or Mixtral's w1 (gate), w3 (up) and w2 (down)
    fused         experts.gate_up_proj (E, 2P, D) = [gate; up] and experts.down_proj (E, D, P)
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, get_args

from globe.checkpoint.header import TensorInfo
from globe.checkpoint.quantized import refuse_quantized
from globe.checkpoint.reader import Checkpoint
from globe.errors import CheckpointError, UnsupportedModelError

Family = Literal["gate", "up", "down"]
FAMILIES: tuple[Family, ...] = get_args(Family)

_EXPERTS = re.compile(r"(?P<prefix>(?P<stem>(?:.+\.)?)layers\.(?P<layer>\d{1,9})\.(?:.+\.)?experts)\..+")
_FUSED = ("gate_up_proj", "gate_up_proj", "down_proj")
_PLAIN = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one layer, as the checkpoint stores them."""

    index: int
    """Number of the decoder layer."""
    prefix: str
    """Name of the experts in the checkpoint: model.layers.0.mlp.experts."""
    layout: Literal["per_expert", "fused"]
    """A matrix for each expert, or one tensor for all of them."""
    projections: tuple[str, str, str]
    """What the checkpoint calls gate, up and down; fused gate and up share a tensor."""
    num_experts: int
    """E."""
    intermediate_size: int
    """P, the rows of an expert matrix."""
    hidden_size: int
    """D, its columns."""
    dtype: str
    """As safetensors writes it; the same for all experts of the layer."""


def source_names(layer: ExpertLayer, family: Family) -> list[str]:
    """The tensors that hold the family: one for each expert in order, or the one fused tensor."""
    projection = layer.projections[FAMILIES.index(family)]
    return _names(layer.prefix, projection, layer.num_experts if layer.layout == "per_expert" else None)


def find_expert_layers(checkpoint: Checkpoint) -> list[ExpertLayer]:
    """The layers that have routed experts, by number.

    Shared experts, routers and dense MLPs are not experts. Multi-token-prediction heads (`mtp.…`, or layers past
    num_hidden_layers) are left out, as transformers leaves them out of the model.

    Raises `UnsupportedModelError` if there are no experts, or some of a kind that is not understood: quantised,
    of unequal shape or dtype, with biases or other tensors beside the three families; and `CheckpointError` if
    experts are missing.
    """
    refuse_quantized(checkpoint)
    num_layers = checkpoint.text_config.get("num_hidden_layers")
    modules: dict[tuple[int, str], dict[str, TensorInfo]] = defaultdict(dict)
    for name, tensor in checkpoint.tensors.items():
        match = _EXPERTS.fullmatch(name)
        if match and "mtp" not in match["stem"].split(".") and _below(int(match["layer"]), num_layers):
            modules[int(match["layer"]), match["prefix"]][name] = tensor
    if not modules:
        raise UnsupportedModelError(_nothing_found(checkpoint))
    layers = [_layer(index, prefix, modules[index, prefix]) for index, prefix in sorted(modules)]
    for earlier, later in itertools.pairwise(layers):
        if earlier.index == later.index:
            raise UnsupportedModelError(
                f"layer {later.index} has two sets of experts, {earlier.prefix} and {later.prefix}; one is supported"
            )
    _check_counts(layers, checkpoint.text_config)
    return layers


def _below(index: int, limit: object) -> bool:
    return not isinstance(limit, int) or index < limit


def _names(prefix: str, projection: str, num_experts: int | None) -> list[str]:
    """Names of one family; no number of experts stands for the fused layout."""
    if num_experts is None:
        return [f"{prefix}.{projection}"]
    return [f"{prefix}.{expert}.{projection}.weight" for expert in range(num_experts)]


def _layer(index: int, prefix: str, tensors: Mapping[str, TensorInfo]) -> ExpertLayer:
    fused = any(f"{prefix}.{projection}" in tensors for projection in _FUSED)
    mixtral = any(name.endswith(tuple(f".{projection}.weight" for projection in _MIXTRAL)) for name in tensors)
    projections = _FUSED if fused else _MIXTRAL if mixtral else _PLAIN
    num_experts = None if fused else _count_experts(prefix, tensors)
    families = {
        family: _names(prefix, projection, num_experts)
        for family, projection in zip(FAMILIES, projections, strict=True)
    }
    _check_names(prefix, tensors, families)
    found = {family: [tensors[name] for name in names] for family, names in families.items()}
    first = found["gate"][0]
    _check_dtypes(first, tensors)
    num_stacked, intermediate_size, hidden_size = _sizes(first, fused)
    _check_shapes(first, found, num_stacked, intermediate_size, hidden_size)
    return ExpertLayer(
        index=index,
        prefix=prefix,
        layout="fused" if fused else "per_expert",
        projections=projections,
        num_experts=num_stacked or len(found["gate"]),
        intermediate_size=intermediate_size,
        hidden_size=hidden_size,
        dtype=first.dtype,
    )


def _count_experts(prefix: str, tensors: Mapping[str, TensorInfo]) -> int:
    numbers = {int(number) for name in tensors if (number := name[len(prefix) + 1 :].split(".")[0]).isdecimal()}
    if gaps := sorted(set(range(len(numbers))) - numbers):
        raise CheckpointError(
            f"{prefix}: expert {gaps[0]} is missing; there are {len(numbers)} experts numbered up to {max(numbers)}. "
            "Download the checkpoint again"
        )
    return len(numbers)


def _check_names(prefix: str, tensors: Mapping[str, TensorInfo], families: Mapping[str, list[str]]) -> None:
    expected = {name for names in families.values() for name in names}
    if unknown := sorted(tensors.keys() - expected):
        raise UnsupportedModelError(
            f"{prefix} holds {len(unknown)} tensors that GloBE does not understand: {', '.join(unknown[:4])}; "
            "experts must be gate, up and down projections without biases or scales"
        )
    for family, names in families.items():
        if tensors.keys().isdisjoint(names):
            raise UnsupportedModelError(f"{prefix} has no {family} projections: {names[0]} and the like are not there")
    if missing := sorted(expected - tensors.keys()):
        raise CheckpointError(f"{len(missing)} expert tensors are missing: {', '.join(missing[:4])}; download it again")


def _check_dtypes(first: TensorInfo, tensors: Mapping[str, TensorInfo]) -> None:
    for tensor in tensors.values():
        if tensor.dtype != first.dtype:
            raise UnsupportedModelError(
                f"{tensor.name} is {tensor.dtype} but {first.name} is {first.dtype}: convert the experts to one dtype"
            )


def _sizes(gate: TensorInfo, fused: bool) -> tuple[int, int, int]:
    """(E, P, D) by the shape of the first gate tensor; E is 0 where experts are not stacked."""
    if fused and len(gate.shape) == 3 and gate.shape[1] % 2 == 0 and 0 not in gate.shape:
        return gate.shape[0], gate.shape[1] // 2, gate.shape[2]
    if not fused and len(gate.shape) == 2 and 0 not in gate.shape:
        return 0, *gate.shape
    raise UnsupportedModelError(
        f"{gate.name} has shape {gate.shape}; {'(E, 2P, D)' if fused else '(P, D)'} was expected"
    )


def _check_shapes(
    first: TensorInfo, found: Mapping[str, list[TensorInfo]], num_stacked: int, intermediate_size: int, hidden_size: int
) -> None:
    for family, tensors in found.items():
        expected = first.shape if family != "down" else (hidden_size, intermediate_size)
        if family == "down" and num_stacked:
            expected = (num_stacked, *expected)
        for tensor in tensors:
            if tensor.shape != expected:
                raise UnsupportedModelError(
                    f"{tensor.name} has shape {tensor.shape}; beside {first.name} of shape {first.shape} it should be "
                    f"{expected}: experts of unequal shape, or dimensions in an order that GloBE does not know"
                )


def _check_counts(layers: list[ExpertLayer], config: Mapping[str, Any]) -> None:
    """The last experts of a layer can only be missed by the configuration's count."""
    stated = next((config[key] for key in _EXPERT_COUNTS if isinstance(config.get(key), int)), None)
    for layer in layers:
        if stated is not None and layer.num_experts != stated:
            raise CheckpointError(
                f"{layer.prefix} holds {layer.num_experts} experts, config.json says {stated}; download it again"
            )


def _nothing_found(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    kind = (
        f"model_type {config.get('model_type', 'not given')}, architectures {config.get('architectures', 'not given')}"
    )
    similar = [name for name in checkpoint.tensors if re.search(r"expert|moe", name)]
    hint = (
        f"its experts are arranged in a way that GloBE does not know: {', '.join(similar[:3])}"
        if similar
        else "it is not a mixture of experts, and GloBE compresses nothing else"
    )
    return f"{checkpoint.folder} ({kind}) has no tensors named layers.N.….experts.…: {hint}"
