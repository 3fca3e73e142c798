from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from globe.errors import CheckpointError, SettingsError, UnsupportedModelError
from globe.model.names import is_factor
from globe.model.quantization_config import GlobeQuantizationConfig
from tests.model.compressed import (
    BANK_SETS,
    FAMILY_SETTINGS,
    LAYERS,
    Compressed,
    logits,
    source_family,
    token_ids,
    write_compressed,
)
from tests.model.conftest import Make
from tests.rounding import assert_equal_but_for_rounding

X = "model.layers.1.mlp.experts"


def load(path: Path, **settings: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, **settings)


def edited(tmp_path: Path, source: Compressed, changes: Mapping[str, Tensor | None]) -> Path:
    """A copy of a compressed checkpoint with tensors replaced, added or (`None`) removed."""
    path = tmp_path / "edited"
    shutil.copytree(source.path, path)
    tensors = {**load_file(path / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


def assert_same_tensors(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    tensors = expected.state_dict()
    assert actual.state_dict().keys() == tensors.keys()
    for name, tensor in actual.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("banks", BANK_SETS)
@pytest.mark.parametrize("model_type", FAMILY_SETTINGS)
def test_has_the_logits_of_the_composed_model(compressed: Make, model_type: str, banks: str) -> None:
    made = compressed(model_type, banks)
    model = load(made.path)
    torch.testing.assert_close(logits(model), logits(made.dense), atol=1e-5, rtol=1e-5)
    factors = {name: tensor for name, tensor in model.state_dict().items() if name in made.factors}
    assert factors.keys() == made.factors.keys()
    for name, tensor in factors.items():
        assert torch.equal(tensor, made.factors[name])


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_activations(tmp_path: Path, activation: str) -> None:
    made = write_compressed(tmp_path, "olmoe", BANK_SETS["per_layer"], activation)
    torch.testing.assert_close(logits(load(made.path)), logits(made.dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", FAMILY_SETTINGS)
def test_bfloat16_gives_the_dense_model_bit_for_bit(compressed: Make, model_type: str) -> None:
    made = compressed(model_type, dtype=torch.bfloat16)
    model = load(made.path)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(made.dense))


def test_dense_experts_are_not_in_memory(compressed: Make) -> None:
    made = compressed("qwen2_moe", "per_layer")
    model = load(made.path)
    parameters = dict(model.named_parameters())
    assert not [name for name in parameters if name.endswith(("gate_up_proj", "down_proj")) and "experts" in name]
    factors = [name for name in parameters if is_factor(name)]
    assert sorted(factors) == sorted(made.factors)


def test_a_shared_bank_has_one_owner(compressed: Make) -> None:
    model = load(compressed("qwen2_moe", "whole_model").path)
    assert [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith("bases")] == [
        "model.globe_banks.layers_0_2_gate_up_down.bases"
    ]


def test_a_copy_is_independent(compressed: Make) -> None:
    model = load(compressed("qwen2_moe").path)
    before = logits(model)
    twin = copy.deepcopy(model)
    assert_equal_but_for_rounding(logits(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("banks", ["per_layer", "up_only", "shared_and_own", "middle_layer"])
@pytest.mark.parametrize("model_type", FAMILY_SETTINGS)
def test_saving_and_loading_again_changes_no_bit(compressed: Make, tmp_path: Path, model_type: str, banks: str) -> None:
    made = compressed(model_type, banks)
    model = load(made.path)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_tensors(again, model)
    assert_equal_but_for_rounding(logits(again), logits(model))
    assert load_file(tmp_path / "model.safetensors").keys() == expected_names(made)
    sections = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (made.path, tmp_path)]
    assert sections[0] == sections[1]


def expected_names(made: Compressed) -> set[str]:
    """The names of the checkpoint that was loaded; Mixtral's own name for the block goes into all of them."""
    names = load_file(made.path / "model.safetensors").keys()
    renames = made.dense.config.model_type == "mixtral"
    return {name.replace(".mlp.", ".block_sparse_moe.") if renames else name for name in names}


@pytest.mark.parametrize("model_type", FAMILY_SETTINGS)
def test_untouched_layers_may_be_fused_on_disk(compressed: Make, tmp_path: Path, model_type: str) -> None:
    made = compressed(model_type, "middle_layer")
    changes: dict[str, Tensor | None] = {
        name: None for name in load_file(made.path / "model.safetensors") if source_family(name)
    }
    tensors = made.dense.state_dict()
    for layer in (0, 2):
        for parameter in ("gate_up_proj", "down_proj"):
            name = f"{made.names.experts[layer]}.{parameter}"
            changes[name] = tensors[name]
    model = load(edited(tmp_path, made, changes))
    assert_same_tensors(model, load(made.path))
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(load(tmp_path / "saved"), model)


def test_saves_in_shards(compressed: Make, tmp_path: Path) -> None:
    model = load(compressed("mixtral", "whole_model").path)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_tensors(load(tmp_path), model)


def test_loading_reports_nothing_amiss(compressed: Make, caplog: pytest.LogCaptureFixture) -> None:
    load(compressed("mixtral").path)
    assert caplog.text == ""


def test_with_and_without_a_head(compressed: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(compressed("qwen3_moe").path)
    base = AutoModel.from_pretrained(compressed("qwen3_moe").path)
    assert_same_tensors(base, model.model)
    base.save_pretrained(tmp_path)
    assert_same_tensors(load(tmp_path).model, base)
    assert "lm_head.weight" in caplog.text
    assert "gate_up_proj" not in caplog.text


def test_loads_from_a_state_dict(compressed: Make) -> None:
    made = compressed("qwen2_moe")
    config = AutoConfig.from_pretrained(made.path)
    tensors = load_file(made.path / "model.safetensors")
    model = type(made.dense).from_pretrained(None, config=config, state_dict=tensors)
    assert_same_tensors(model, load(made.path))
    incomplete = {name: tensor for name, tensor in tensors.items() if name != f"{X}.globe_up_codes"}
    with pytest.raises(CheckpointError, match=rf"lacks {X}.globe_up_codes: the state dict is incomplete"):
        type(made.dense).from_pretrained(None, config=config, state_dict=incomplete)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{X}.globe_up_codes", None, f"lacks {X}.globe_up_codes: the checkpoint is incomplete"),
        (f"{X}.globe_gate_dense", None, f"lacks {X}.globe_gate_dense"),
        ("model.globe_banks.layers_0_2_gate_up.bases", None, "lacks model.globe_banks.layers_0_2_gate_up.bases"),
        (f"{X}.globe_up_adapters", torch.zeros(6, 8, 4), r"globe_up_adapters \(6, 8, 4\) instead of \(6, 8, 8\)"),
        (f"{X}.globe_gate_codes", torch.zeros(6, 4), f"has {X}.globe_gate_codes: its config.json does not mention"),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_factors_that_are_not_as_described_are_refused(
    compressed: Make, tmp_path: Path, model_type: str, name: str, change: Tensor | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(edited(tmp_path, compressed(model_type), {name: change}))


def test_a_bank_for_a_layer_without_experts_is_refused(compressed: Make) -> None:
    made = compressed("qwen2_moe")
    config = AutoConfig.from_pretrained(made.path)
    config.quantization_config["banks"][0]["layers"] = [0, LAYERS]
    with pytest.raises(CheckpointError, match=r"for layers \[3\], but Qwen2MoeForCausalLM has .* layers \[0, 1, 2\]"):
        load(made.path, config=config)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config.quantization_config = GlobeQuantizationConfig(BANK_SETS["per_layer"]).to_dict()
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no routed experts"):
        load(tmp_path, config=config)


def test_a_dense_model_is_not_compressed_while_it_loads(compressed: Make) -> None:
    with pytest.raises(SettingsError, match="globe compress"):
        load(compressed("qwen2_moe").source, quantization_config=GlobeQuantizationConfig(BANK_SETS["per_layer"]))


def test_other_models_are_left_alone(compressed: Make) -> None:
    made = compressed("qwen2_moe")
    load(made.path)
    stock = load(made.source)
    assert "model.layers.*.mlp.experts.gate_up_proj" in stock.tp_plan
    with torch.no_grad():
        assert stock(token_ids()).logits.isfinite().all()
