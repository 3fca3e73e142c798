from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from globe.errors import UnsupportedModelError
from globe.model.expert_modules import ExpertsLayout, experts_layout, factor_names, find_experts
from globe.model.names import FactorNames
from tests.model.compressed import FAMILY_SETTINGS, LAYERS, D, E, P, tiny_config


def on_meta(model_type: str, **settings: Any) -> nn.Module:
    small = {"vocab_size": 16, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, **{**small, **settings})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", FAMILY_SETTINGS)
def test_finds_the_experts_of_a_model_on_the_meta_device(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    found = find_experts(model)
    assert [(experts.layer, experts.path) for experts in found] == [
        (layer, f"model.layers.{layer}.mlp.experts") for layer in range(LAYERS)
    ]
    for experts in found:
        assert experts.module is model.get_submodule(experts.path)
        assert experts.layout == ExpertsLayout(E, P, D, is_transposed=False, is_concatenated=True, has_bias=False)
        assert experts.layout.dense_parameters == {"gate_up_proj": (E, 2 * P, D), "down_proj": (E, D, P)}
    assert factor_names(model) == FactorNames({experts.layer: experts.path for experts in found}, base="model")
    assert factor_names(model.base_model).experts[1] == "layers.1.mlp.experts"
    assert factor_names(model.base_model).base == ""


def test_only_some_layers_have_experts() -> None:
    settings = {"num_experts": 4, "moe_intermediate_size": 8, "num_hidden_layers": 4, "mlp_only_layers": [0, 2]}
    assert [experts.layer for experts in find_experts(on_meta("qwen2_moe", **settings))] == [1, 3]


def test_reads_a_transposed_interleaved_biased_layout() -> None:
    model = on_meta("gpt_oss", num_local_experts=4, intermediate_size=8, head_dim=8, num_key_value_heads=1)
    layout = find_experts(model)[0].layout
    assert layout == ExpertsLayout(4, 8, D, is_transposed=True, is_concatenated=False, has_bias=True)
    assert layout.dense_parameters == {"gate_up_proj": (4, D, 16), "down_proj": (4, 8, D)}


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM has no routed experts.* found no experts at all"
    ):
        find_experts(on_meta("llama", intermediate_size=8))


def test_a_class_without_layout_flags_is_refused_by_name() -> None:
    module = find_experts(on_meta("mixtral", num_local_experts=2, intermediate_size=8, num_key_value_heads=2))[0].module
    del module.is_transposed
    with pytest.raises(UnsupportedModelError, match="MixtralExperts is not supported: it does not say how"):
        experts_layout(module)


@pytest.mark.parametrize("num_identity", [0, 3])
def test_longcat_has_unused_rows_for_its_identity_experts(num_identity: int) -> None:
    settings = {"n_routed_experts": 4, "expert_ffn_hidden_size": 8, "num_layers": 1, "num_hidden_layers": 2}
    model = on_meta("longcat_flash", **settings, zero_expert_num=num_identity)
    layout = find_experts(model)[0].layout
    assert (layout.num_experts, layout.intermediate_size, layout.num_identity) == (4, 8, num_identity)
    assert layout.dense_parameters == {"gate_up_proj": (4 + num_identity, 16, D), "down_proj": (4, D, 8)}


def test_llama4_hands_its_experts_presorted_tokens() -> None:
    settings = {"num_local_experts": 2, "intermediate_size": 8, "intermediate_size_mlp": 8, "head_dim": 8}
    layout = find_experts(on_meta("llama4_text", **settings))[0].layout
    assert layout == ExpertsLayout(2, 8, D, is_transposed=True, is_concatenated=True, has_bias=False, presorted=True)


def test_experts_without_a_gate_are_refused() -> None:
    module = find_experts(on_meta("mixtral", num_local_experts=2, intermediate_size=8, num_key_value_heads=2))[0].module
    module.has_gate = False
    with pytest.raises(UnsupportedModelError, match="MixtralExperts is not supported: its experts have no gate"):
        experts_layout(module)


def test_parameters_that_do_not_fit_the_flags_are_refused() -> None:
    module = find_experts(on_meta("mixtral", num_local_experts=2, intermediate_size=8, num_key_value_heads=2))[0].module
    module.scale = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(UnsupportedModelError, match=r"MixtralExperts is not supported: expected parameters .*'scale'"):
        experts_layout(module)


def test_two_sets_of_experts_in_a_layer_are_refused() -> None:
    model = on_meta("mixtral", num_local_experts=2, intermediate_size=8, num_key_value_heads=2)
    model.model.layers[1].more = find_experts(model)[0].module
    model.model.layers[0].mlp = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="two sets of routed experts numbered 1"):
        find_experts(model)


def test_experts_outside_numbered_layers_are_refused() -> None:
    model = on_meta("mixtral", num_local_experts=2, intermediate_size=8, num_key_value_heads=2)
    with pytest.raises(UnsupportedModelError, match=r"mlp.experts \(MixtralExperts\) .* cannot tell its layer number"):
        find_experts(model.model.layers[0])
