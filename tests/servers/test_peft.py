"""LoRA on the attention of a compressed model, by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from globe import CompressConfig, compress
from tests.model.compressed import logits, token_ids
from tests.rounding import assert_equal_but_for_rounding
from tests.tiny_sources import write_source

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks


@pytest.mark.parametrize(
    "settings", [{"keep": 0.7, "steps": 1}, {"keep": 0.7, "steps": 1, "scope": "model"}, {"bits": 3}], ids=str
)
def test_lora_on_attention_trains_saves_and_loads(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_source(tmp_path / "source")
    path = tmp_path / "small"
    compress(tmp_path / "source", path, CompressConfig(**settings))
    model = AutoModelForCausalLM.from_pretrained(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, adapters)
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=0.02)
    losses: list[float] = []
    for _ in range(4):
        loss = adapted(token_ids(), labels=token_ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
    assert_equal_but_for_rounding(logits(again), logits(adapted.eval()))
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-5)
    after = merged.state_dict()
    assert all(torch.equal(after[name], before[name]) != ("q_proj.w" in name or "v_proj.w" in name) for name in before)
