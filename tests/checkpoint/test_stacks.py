"""Stacks of experts against the parameters of the transformers modules that load the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from globe.checkpoint.layout import LanguageModel, find_expert_layers, source_names
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.checkpoint.stacks import check_finite, dense_tensor, read_family
from globe.checkpoint.tensor_files import save_tensors
from globe.errors import CheckpointError
from globe.model.configuration import expert_layers
from globe.terms import FAMILIES, Family
from tests.rounding import assert_equal_but_for_rounding

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, num_experts=3, moe_intermediate_size=8, intermediate_size=16, shared_expert_intermediate_size=8
    ),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=8, intermediate_size=16, head_dim=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3, intermediate_size=8),
    "olmoe": OlmoeConfig(**SIZES, num_experts=3, intermediate_size=8),
}


@pytest.fixture(params=[(name, layout) for name in CONFIGS for layout in ("per_expert", "fused")], ids="-".join)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Checkpoint]:
    """A tiny model of each family and its checkpoint, as save_pretrained splits it and as the modules hold it."""
    name, layout = request.param
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
    if layout == "per_expert":
        model.save_pretrained(tmp_path, max_shard_size="2KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    else:
        model.config.save_pretrained(tmp_path)
        save_tensors(tmp_path / "model.safetensors", model.state_dict())
    return model, open_checkpoint(tmp_path)


def families_of(experts: Any) -> dict[Family, Tensor]:
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    return {"gate": gate, "up": up, "down": experts.down_proj.detach().mT}


def test_stacks_are_the_modules_parameters(saved: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = saved
    layers = expert_layers(checkpoint)
    assert [layer.index for layer in layers] == [0, 1]
    for layer in layers:
        expected = families_of(model.model.layers[layer.index].mlp.experts)
        for family in FAMILIES:
            stack = read_family(checkpoint, layer, family)
            assert stack.shape == (3, 8, 16)
            assert stack.is_contiguous()
            assert stack.dtype == torch.bfloat16
            assert torch.equal(stack, expected[family])


def test_dense_tensors_are_the_source_s_own(saved: tuple[PreTrainedModel, Checkpoint]) -> None:
    _, checkpoint = saved
    for layer in expert_layers(checkpoint):
        stacks = {family: read_family(checkpoint, layer, family) for family in FAMILIES}
        for name in {name for family in FAMILIES for name in source_names(layer, family)}:
            made = dense_tensor(layer, name, stacks)
            assert made.is_contiguous()
            assert made.dtype == torch.bfloat16
            assert torch.equal(made, checkpoint.read(name))


def test_rewritten_experts_load_and_act_as_the_original(
    saved: tuple[PreTrainedModel, Checkpoint], tmp_path: Path
) -> None:
    """The whole way round, judged by logits: gate, up and down are not swapped in any layout."""
    model, checkpoint = saved
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for layer in expert_layers(checkpoint):
        stacks = {family: read_family(checkpoint, layer, family) for family in FAMILIES}
        for name in {name for family in FAMILIES for name in source_names(layer, family)}:
            tensors[name] = dense_tensor(layer, name, stacks)
    model.config.save_pretrained(tmp_path / "again")
    save_tensors(tmp_path / "again" / "model.safetensors", tensors)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert_equal_but_for_rounding(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("layout", ["plain", "mixtral", "fused"])
@pytest.mark.parametrize(("value", "found"), [(torch.nan, "NaN"), (torch.inf, "infinite"), (-torch.inf, "infinite")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_that_is_not_finite_is_refused_with_the_tensor_s_name(
    write_checkpoint: Callable[..., Path],
    expert_tensors: Callable[..., dict[str, Tensor]],
    layout: str,
    value: float,
    found: str,
    family: Family,
) -> None:
    tensors = expert_tensors(layout, dtype=torch.bfloat16)
    folder = write_checkpoint({"model.safetensors": tensors})
    (layer,) = find_expert_layers(open_checkpoint(folder), LanguageModel("tiny_moe"))
    name = source_names(layer, family)[-1]
    tensors[name].flatten()[0 if family == "gate" else -1] = value
    save_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"tensor {name} holds {found}"):
        read_family(open_checkpoint(folder), layer, family)


def test_an_unknown_name_is_a_key_error(
    write_checkpoint: Callable[..., Path], expert_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    for layout in ("plain", "fused"):
        folder = write_checkpoint({"model.safetensors": expert_tensors(layout)}, name=layout)
        (layer,) = find_expert_layers(open_checkpoint(folder), LanguageModel("tiny_moe"))
        with pytest.raises(KeyError):
            dense_tensor(layer, "lm_head.weight", {})


def test_finite_extremes_and_empty_tensors_pass() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        check_finite(torch.full((4,), torch.finfo(dtype).max, dtype=dtype), "largest")
    check_finite(torch.zeros(0), "empty")


def test_files_of_the_tests_are_read_as_the_library_reads_them(saved: tuple[PreTrainedModel, Checkpoint]) -> None:
    _, checkpoint = saved
    for shard in checkpoint.shards:
        for name, tensor in load_file(checkpoint.folder / shard).items():
            assert torch.equal(checkpoint.read(name), tensor)
