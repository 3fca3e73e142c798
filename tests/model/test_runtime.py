"""What users do with a loaded model besides one forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import validate_quantization_for_training

from globe.model.names import is_factor
from tests.model.compressed import FAMILY_SETTINGS, D, logits, token_ids
from tests.model.conftest import Make
from tests.rounding import assert_equal_but_for_rounding

OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
}


@pytest.mark.parametrize("model_type", FAMILY_SETTINGS)
def test_generate(compressed: Make, model_type: str) -> None:
    made = compressed(model_type)
    model = AutoModelForCausalLM.from_pretrained(made.path)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(token_ids(), **settings), made.dense.generate(token_ids(), **settings))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_experts_implementation_makes_no_difference(compressed: Make, implementation: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed("mixtral").path)
    before = logits(model)
    model.set_experts_implementation(implementation)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("banks", ["per_layer", "shared_and_own", "whole_model"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_disk_offload(
    compressed: Make, tmp_path: Path, recwarn: pytest.WarningsRecorder, model_type: str, banks: str
) -> None:
    made = compressed(model_type, banks)
    whole = AutoModelForCausalLM.from_pretrained(made.path)
    shared = hasattr(whole.model, "globe_banks")
    device_map = OFFLOADED | ({"model.globe_banks": "disk"} if shared else {})
    model = AutoModelForCausalLM.from_pretrained(made.path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[0].mlp.experts.globe_down_adapters.is_meta
    assert_equal_but_for_rounding(logits(model), logits(whole))
    model.save_pretrained(tmp_path / "saved")
    assert "offloaded modules" in str(recwarn.pop(UserWarning).message)
    assert_equal_models(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), whole)


@pytest.mark.parametrize("banks", ["per_layer", "whole_model"])
def test_offload_of_a_loaded_model(compressed: Make, tmp_path: Path, banks: str) -> None:
    made = compressed("qwen2_moe", banks)
    expected = logits(AutoModelForCausalLM.from_pretrained(made.path))
    in_memory = cpu_offload(AutoModelForCausalLM.from_pretrained(made.path), execution_device="cpu")
    on_disk = AutoModelForCausalLM.from_pretrained(made.path)
    disk_offload(on_disk, tmp_path, execution_device="cpu")
    for model in (in_memory, on_disk):
        factors = [parameter for name, parameter in model.named_parameters() if is_factor(name)]
        assert factors
        assert all(parameter.is_meta for parameter in factors)
        for _ in range(2):
            assert_equal_but_for_rounding(logits(model), expected)


@pytest.mark.parametrize("banks", ["per_layer", "whole_model"])
def test_automatic_device_map(compressed: Make, tmp_path: Path, banks: str) -> None:
    made = compressed("qwen2_moe", banks)
    whole = AutoModelForCausalLM.from_pretrained(made.path)
    placed = AutoModelForCausalLM.from_pretrained(made.path, device_map="auto")
    assert_equal_but_for_rounding(logits(placed), logits(whole))
    size = sum(tensor.numel() * tensor.element_size() for tensor in whole.state_dict().values())
    model = AutoModelForCausalLM.from_pretrained(
        made.path, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path
    )
    assert "disk" in model.hf_device_map.values()
    assert_equal_but_for_rounding(logits(model), logits(whole))


def assert_equal_models(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    tensors = expected.state_dict()
    assert actual.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in actual.state_dict().items())


def test_compiled_block(compressed: Make) -> None:
    block = AutoModelForCausalLM.from_pretrained(compressed("qwen2_moe").path).model.layers[1].mlp
    compiled = torch.compile(block, backend="aot_eager")
    with torch.no_grad():
        for length in (7, 3):
            states = torch.randn(1, length, D)
            torch.testing.assert_close(compiled(states), block(states))


def test_fine_tuning_lowers_the_loss(compressed: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed("qwen2_moe", "per_layer").path).train()
    validate_quantization_for_training(model)  # what Trainer asks
    factors = [parameter for name, parameter in model.named_parameters() if "globe_" in name]
    optimizer = torch.optim.Adam(factors, lr=0.01)
    losses: list[float] = []
    model.activation_checkpointing_enable()
    for _ in range(5):
        loss = model(token_ids(), labels=token_ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in factors)


def test_trainer_saves_loads_and_resumes(compressed: Make, tmp_path: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    data = [{"input_ids": ids, "labels": ids} for ids in token_ids(batch=4)]
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True
    )
    trainer = Trainer(load(compressed("qwen2_moe").path), settings, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert_equal_models(load(tmp_path / "saved"), trainer.model)
    resumed = Trainer(load(compressed("qwen2_moe").path), settings, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal_models(resumed.model, trainer.model)
