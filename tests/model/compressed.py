"""Tiny models of every family, and compressed checkpoints of them written by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from globe.model.bank_spec import BankSpec
from globe.model.expert_modules import factor_names
from globe.model.names import TRIPWIRE_SHAPE, FactorNames, dense_halves
from globe.model.quantization_config import GlobeQuantizationConfig

E, P, D, LAYERS = 6, 8, 16, 3
FAMILIES = ("gate", "up", "down")
FAMILY_SETTINGS = {
    "qwen2_moe": {"moe_intermediate_size": P, "num_experts": E, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"moe_intermediate_size": P, "num_experts": E, "head_dim": 8},
    "mixtral": {"intermediate_size": P, "num_local_experts": E},
    "olmoe": {"intermediate_size": P, "num_experts": E},
}


def tiny_config(model_type: str, dtype: torch.dtype = torch.float32) -> PretrainedConfig:
    """A model of three layers with six experts each, weights large enough for every expert to matter."""
    return AutoConfig.for_model(
        model_type,
        **{"intermediate_size": 24, **FAMILY_SETTINGS[model_type]},
        vocab_size=48,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
    )


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, dtype)).eval()


def bank(layers: Sequence[int], families: Sequence[str], rank: int = 5, num_bases: int = 4) -> BankSpec:
    return BankSpec(tuple(layers), tuple(families), rank, num_bases)


PER_LAYER = tuple(bank([layer], FAMILIES) for layer in range(LAYERS))
BANK_SETS = {
    "per_layer": PER_LAYER,
    "per_family": tuple(bank([layer], [family]) for layer in range(LAYERS) for family in FAMILIES),
    "up_only": tuple(bank([layer], ["up"]) for layer in range(LAYERS)),
    "gate_only": tuple(bank([layer], ["gate"]) for layer in range(LAYERS)),
    "gate_up": tuple(bank([layer], ["gate", "up"]) for layer in range(LAYERS)),
    "down_only": tuple(bank([layer], ["down"]) for layer in range(LAYERS)),
    "whole_model": (bank(range(LAYERS), FAMILIES, num_bases=7),),
    "shared_and_own": (bank([0, 2], ["gate", "up"]), bank([0, 1, 2], ["down"], rank=3), bank([1], ["up"], rank=8)),
    "middle_layer": (bank([1], FAMILIES),),
}


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A compressed checkpoint, the source it was made of, and the dense model with the same experts."""

    path: Path
    source: Path
    dense: PreTrainedModel
    names: FactorNames
    factors: dict[str, Tensor]


def random_factors(
    model: PreTrainedModel, banks: Sequence[BankSpec], dtype: torch.dtype, seed: int = 1
) -> dict[str, Tensor]:
    """Factors, by state-dict name, whose experts are about as large as the model's."""
    names = factor_names(model)
    torch.manual_seed(seed)
    factors: dict[str, Tensor] = {}
    for spec in banks:
        factors[names.bases(spec)] = torch.randn(spec.num_bases, spec.rank, D)
        for layer in spec.layers:
            for family in spec.families:
                factors[names.adapters(layer, family)] = 0.2 * torch.randn(E, P, spec.rank)
                factors[names.codes(layer, family)] = 0.7 * torch.randn(E, spec.num_bases)
    return {name: tensor.to(dtype) for name, tensor in factors.items()}


def composed(
    names: FactorNames, factors: dict[str, Tensor], spec: BankSpec, layer: int, family: str, phi: str
) -> Tensor:
    """What, (E, P, D), in float64 and one expert at a time."""
    activation = {"identity": lambda t: t, "tanh": torch.tanh, "silu": torch.nn.functional.silu}[phi]
    bases = factors[names.bases(spec)].double()
    adapters = factors[names.adapters(layer, family)].double()
    codes = factors[names.codes(layer, family)].double()
    return torch.stack(
        [
            adapters[expert] @ activation(sum(codes[expert, j] * bases[j] for j in range(len(bases))))
            for expert in range(len(adapters))
        ]
    )


def put_experts(model: PreTrainedModel, layer: int, family: str, matrices: Tensor) -> None:
    """Replace a family's dense weights, (E, P, D), in the module."""
    experts = model.get_submodule(factor_names(model).experts[layer])
    with torch.no_grad():
        if family == "down":
            experts.down_proj.copy_(matrices.transpose(1, 2))
        else:
            start = 0 if family == "gate" else P
            experts.gate_up_proj[:, start : start + P].copy_(matrices)


def write_compressed(
    folder: Path,
    model_type: str,
    banks: Sequence[BankSpec],
    activation: str = "tanh",
    dtype: torch.dtype = torch.float32,
    factors: dict[str, Tensor] | None = None,
) -> Compressed:
    """Save a tiny model, then what GloBE makes of it: untouched tensors under the source's names."""
    model = tiny_model(model_type, dtype)
    names = factor_names(model)
    source, path = folder / "source", folder / "compressed"
    model.save_pretrained(source)
    factors = random_factors(model, banks, dtype) if factors is None else factors
    tensors = dict(load_file(source / "model.safetensors"))
    tensors.update(factors)
    for layer in range(LAYERS):
        families = {family for spec in banks if layer in spec.layers for family in spec.families}
        gate_up = model.get_submodule(names.experts[layer]).gate_up_proj.detach()
        for half in dense_halves(families):
            tensors[names.dense(layer, half)] = (gate_up[:, :P] if half == "gate" else gate_up[:, P:]).contiguous()
        gone = families | set(dense_halves(families))
        for name in [name for name in tensors if f"layers.{layer}." in name and source_family(name) in gone]:
            del tensors[name]
    for spec in banks:
        for layer in spec.layers:
            for family in spec.families:
                put_experts(model, layer, family, composed(names, factors, spec, layer, family, activation))
    quantization = GlobeQuantizationConfig(banks, activation=activation, globe_version="0.1.0")
    tensors[names.tripwire(quantization.compressed)] = torch.zeros(TRIPWIRE_SHAPE, dtype=dtype)
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization.to_dict()}))
    return Compressed(path, source, model, names, factors)


def source_family(name: str) -> str | None:
    """The family of a source tensor; `None` if it is not a routed expert's own."""
    if ".experts." not in name or "globe_" in name:
        return None
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    mixtral = {"w1": "gate", "w3": "up", "w2": "down"}
    return {**mixtral, "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}.get(leaf)


def token_ids(batch: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    return torch.randint(3, 48, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits
