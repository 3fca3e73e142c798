"""Which tensors of a checkpoint are routed experts, and how the files arrange them.

Two arrangements exist, under any prefix that ends in `layers.N.….experts`:

    per expert    experts.{i}.{gate_proj,up_proj,down_proj}.weight, or Mixtral's w1 (gate), w3 (up) and w2 (down)
    fused         experts.gate_up_proj (E, 2P, D) = [gate; up] and experts.down_proj (E, D, P); Granite calls them
                  block_sparse_moe.input_linear.weight and output_linear.weight

Fused tensors may be transposed, (E, D, 2P) and (E, P, D): their shapes tell, since 2P and P can only be in one order.
What shapes cannot tell is in `_TRAITS`, by model type.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from globe.checkpoint.header import FLOAT_DTYPES, TensorInfo
from globe.checkpoint.quantized import refuse_quantized
from globe.checkpoint.reader import Checkpoint
from globe.errors import CheckpointError, UnsupportedModelError
from globe.terms import FAMILIES, Family

# blocks: what save_pretrained of transformers 5.24 calls Kimi-K2.5's layers, and loads
_EXPERTS = re.compile(
    r"(?P<prefix>(?P<stem>(?:.+\.)?)(?:layers|(?<=^language_model\.model\.)blocks)\.(?P<layer>\d{1,9})\."
    r"(?:.+\.)?(?:experts(?=\.)|block_sparse_moe(?=\.(?:input|output)_linear\.weight$)))\..+"
)
_FUSED = ("gate_up_proj", "gate_up_proj", "down_proj")
_GRANITE = ("input_linear.weight", "input_linear.weight", "output_linear.weight")
_PLAIN = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")
_DTYPE_WORDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""In config.json, and their names in safetensors."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What the arrangement of the files depends on beside their names and shapes: as transformers reads config.json."""

    model_type: str
    num_layers: int | None = None
    """Layers from there on are not part of the model; None: all are."""
    num_identity: int = 0
    """Experts that return their input, for which the files may have unused matrices."""
    dtype: str = "BF16"
    """Of weights that are quantised, when they are not."""


@dataclasses.dataclass(frozen=True)
class _Traits:
    """What a family's fused tensors are like beyond their names and shapes."""

    interleaved: bool = False
    """Gate and up alternate along the 2P."""
    biases: tuple[str, ...] = ()
    """Tensors beside the matrices, which stay as they are."""


_TRAITS: Mapping[str, _Traits] = {
    "gpt_oss": _Traits(interleaved=True, biases=("gate_up_proj_bias", "down_proj_bias")),
    "openai_privacy_filter": _Traits(biases=("gate_up_proj_bias", "down_proj_bias")),
}


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
    """As safetensors writes it: that of all the layer's experts, or the narrowest that holds all of theirs exactly."""
    transposed: bool = False
    """Fused tensors are (E, D, 2P) and (E, P, D)."""
    interleaved: bool = False
    """Rows of gate and up alternate in the fused tensor."""
    num_unused: int = 0
    """Gate and up matrices behind the E experts that no one computes: LongCat allocates them for its identity experts.
    They are not compressed, and zeros in a dense export."""
    stored_dtypes: tuple[str, ...] = ()
    """In the files; several where models of different dtypes were merged."""


def stated_model(config: Mapping[str, Any]) -> LanguageModel | None:
    """The language model as config.json itself describes it; None where transformers has to fill in what is left out,
    or to find the language model among other parts."""
    text = config if "num_hidden_layers" in config else config.get("text_config")
    if not isinstance(text, Mapping) or (text is config and "text_config" in config):
        return None
    model_type, num_layers, num_identity = (
        text.get(key) for key in ("model_type", "num_hidden_layers", "zero_expert_num")
    )
    if not isinstance(model_type, str) or type(num_layers) is not int or type(num_identity or 0) is not int:
        return None
    stated = [_DTYPE_WORDS.get(str(part.get(key))) for part in (text, config) for key in ("dtype", "torch_dtype")]
    dtype = next((name for name in stated if name), LanguageModel.dtype)
    return LanguageModel(model_type, num_layers, num_identity or 0, dtype)


def is_of_experts(name: str) -> bool:
    """Whether a tensor of this name is one of routed experts."""
    return _EXPERTS.fullmatch(name) is not None


def source_names(layer: ExpertLayer, family: Family) -> list[str]:
    """The tensors that hold the family: one for each expert in order, the unused ones last, or the one fused tensor."""
    projection = layer.projections[FAMILIES.index(family)]
    num_matrices = layer.num_experts + (layer.num_unused if family != "down" else 0)
    return _names(layer.prefix, projection, num_matrices if layer.layout == "per_expert" else None)


def find_expert_layers(checkpoint: Checkpoint, model: LanguageModel) -> list[ExpertLayer]:
    """The layers that have routed experts, by number.

    Shared experts, routers and dense MLPs are not experts. Multi-token-prediction heads (`mtp.…`, or layers past
    num_hidden_layers) are left out, as transformers leaves them out of the model.

    Raises `UnsupportedModelError` if there are no experts, or some of a kind that is not understood: quantised,
    of unequal shape, with biases or other tensors beside the three families; and `CheckpointError` if
    experts are missing.
    """
    refuse_quantized(checkpoint)
    modules: dict[tuple[int, str], dict[str, TensorInfo]] = defaultdict(dict)
    for name, tensor in checkpoint.tensors.items():
        match = _EXPERTS.fullmatch(name)
        if match is None or "mtp" in match["stem"].split("."):
            continue
        if model.num_layers is None or int(match["layer"]) < model.num_layers:
            modules[int(match["layer"]), match["prefix"]][name] = tensor
    if not modules:
        raise UnsupportedModelError(_nothing_found(checkpoint))
    try:
        layers = [_layer(index, prefix, modules[index, prefix], model) for index, prefix in sorted(modules)]
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{model.model_type} is not supported as it is stored here: {error}") from error
    for earlier, later in itertools.pairwise(layers):
        if earlier.index == later.index:
            raise UnsupportedModelError(
                f"layer {later.index} has two sets of experts, {earlier.prefix} and {later.prefix}; one is supported"
            )
    return layers


def _names(prefix: str, projection: str, num_experts: int | None) -> list[str]:
    """Names of one family; no number of experts stands for the fused layout."""
    if num_experts is None:
        return [f"{prefix}.{projection}"]
    return [f"{prefix}.{expert}.{projection}.weight" for expert in range(num_experts)]


def _layer(index: int, prefix: str, tensors: Mapping[str, TensorInfo], model: LanguageModel) -> ExpertLayer:
    traits = _TRAITS.get(model.model_type, _Traits())
    biases = {f"{prefix}.{bias}" for bias in traits.biases}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in biases}
    fused = [names for names in (_FUSED, _GRANITE) if any(f"{prefix}.{name}" in tensors for name in names)]
    mixtral = any(name.endswith(tuple(f".{projection}.weight" for projection in _MIXTRAL)) for name in tensors)
    projections = fused[0] if fused else _MIXTRAL if mixtral else _PLAIN
    num_unused = model.num_identity
    counts: dict[Family, int | None] = dict.fromkeys(FAMILIES)
    if not fused:
        num_unused = _count_unused(prefix, projections, tensors, num_unused)
        total = _count_experts(prefix, tensors)
        counts = {"gate": total, "up": total, "down": total - num_unused}
    families: dict[Family, list[str]] = {
        family: _names(prefix, projection, counts[family])
        for family, projection in zip(FAMILIES, projections, strict=True)
    }
    _check_names(prefix, tensors, families)
    _check_dtypes(tensors)
    stored: dict[Family, list[TensorInfo]] = {
        family: [tensors[name] for name in names] for family, names in families.items()
    }
    shape = _fused_shape if fused else _per_expert_shape
    num_experts, intermediate_size, hidden_size, transposed = shape(stored, num_unused)
    return ExpertLayer(
        index=index,
        prefix=prefix,
        layout="fused" if fused else "per_expert",
        projections=projections,
        num_experts=num_experts,
        intermediate_size=intermediate_size,
        hidden_size=hidden_size,
        dtype=_common_dtype(tensor.dtype for tensor in tensors.values()),
        transposed=transposed,
        interleaved=bool(fused) and traits.interleaved,
        num_unused=num_unused,
        stored_dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
    )


def dtype_notes(layers: Iterable[ExpertLayer]) -> list[str]:
    """What to tell of layers whose experts are of several dtypes."""
    mixed = defaultdict[tuple[tuple[str, ...], str], list[int]](list)
    for layer in layers:
        if len(layer.stored_dtypes) > 1:
            mixed[layer.stored_dtypes, layer.dtype].append(layer.index)
    return [
        f"{len(indices)} layers have experts in {' and '.join(dtypes)}, layer {indices[0]} first; they are read as "
        f"{common}, which holds both exactly, and their factors are stored so unless factor_dtype says otherwise"
        for (dtypes, common), indices in mixed.items()
    ]


def _count_unused(prefix: str, projections: tuple[str, str, str], tensors: Mapping[str, TensorInfo], most: int) -> int:
    """Experts at the end that have a gate and no down projection, at most as many as the configuration accounts for."""
    gates, downs = (
        sum(name.endswith(f".{projection}.weight") for name in tensors)
        for projection in (projections[0], projections[2])
    )
    unused = gates - downs
    return unused if 0 < unused <= most and f"{prefix}.{gates - 1}.{projections[2]}.weight" not in tensors else 0


def _count_experts(prefix: str, tensors: Mapping[str, TensorInfo]) -> int:
    numbers = {int(number) for name in tensors if (number := name[len(prefix) + 1 :].split(".")[0]).isdecimal()}
    if gaps := sorted(set(range(len(numbers))) - numbers):
        raise CheckpointError(
            f"{prefix}: expert {gaps[0]} is missing; there are {len(numbers)} experts numbered up to {max(numbers)}. "
            "Download the checkpoint again"
        )
    return len(numbers)


def _check_names(prefix: str, tensors: Mapping[str, TensorInfo], families: Mapping[Family, list[str]]) -> None:
    expected = {name for names in families.values() for name in names}
    if unknown := sorted(tensors.keys() - expected):
        raise UnsupportedModelError(
            f"{prefix} holds {len(unknown)} tensors that GloBE does not understand: {', '.join(unknown[:4])}; "
            "experts must be gate, up and down projections without biases or scales"
        )
    for family, names in families.items():
        if tensors.keys().isdisjoint(names):
            example = names[0] if names else f"{prefix}.0.{family}_proj.weight"
            raise UnsupportedModelError(f"{prefix} has no {family} projections: {example} and the like are not there")
    if missing := sorted(expected - tensors.keys()):
        raise CheckpointError(f"{len(missing)} expert tensors are missing: {', '.join(missing[:4])}; download it again")


def _check_dtypes(tensors: Mapping[str, TensorInfo]) -> None:
    if other := [tensor for tensor in tensors.values() if tensor.dtype not in FLOAT_DTYPES]:
        raise UnsupportedModelError(
            f"{other[0].name} is {other[0].dtype}; experts must be of {', '.join(FLOAT_DTYPES)}"
        )


def _common_dtype(names: Iterable[str]) -> str:
    """The narrowest dtype that holds all of these exactly."""
    found = set(names)
    return "F32" if found == {"F16", "BF16"} else min(found, key=FLOAT_DTYPES.index)


def _per_expert_shape(stored: Mapping[Family, list[TensorInfo]], num_unused: int) -> tuple[int, int, int, bool]:
    """(E, P, D, not transposed) by the shape of the first gate matrix, which all others must fit."""
    gate = stored["gate"][0]
    if len(gate.shape) != 2 or 0 in gate.shape:
        raise UnsupportedModelError(f"{gate.name} has shape {gate.shape}; (P, D) was expected")
    for family, tensors in stored.items():
        for tensor in tensors:
            _check_shape(tensor, gate, gate.shape[::-1] if family == "down" else gate.shape)
    return len(stored["gate"]) - num_unused, *gate.shape, False


def _fused_shape(stored: Mapping[Family, list[TensorInfo]], num_unused: int) -> tuple[int, int, int, bool]:
    """(E, P, D, whether transposed) by the shapes of the two fused tensors."""
    (gate_up,), (down,) = stored["gate"], stored["down"]
    if len(gate_up.shape) != 3 or 0 in gate_up.shape:
        raise UnsupportedModelError(f"{gate_up.name} has shape {gate_up.shape}; three dimensions were expected")
    num_gates, rows, columns = gate_up.shape
    num_experts = num_gates - num_unused
    if down.shape == (num_experts, columns // 2, rows) and columns % 2 == 0:
        return num_experts, columns // 2, rows, True
    if rows % 2:
        raise UnsupportedModelError(f"{gate_up.name} has shape {gate_up.shape}; (E, 2P, D) or (E, D, 2P) was expected")
    _check_shape(down, gate_up, (num_experts, columns, rows // 2))
    return num_experts, rows // 2, columns, False


def _check_shape(tensor: TensorInfo, beside: TensorInfo, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise UnsupportedModelError(
            f"{tensor.name} has shape {tensor.shape}; beside {beside.name} of shape {beside.shape} it should be "
            f"{expected}: experts of unequal shape, or dimensions in an order that GloBE does not know"
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
