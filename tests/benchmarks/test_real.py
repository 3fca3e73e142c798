"""The models of the benchmark on real weights compute what they were made from, and its claims are judged right."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.real import judge_claims

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("hidden", [16, 20])
@torch.no_grad()
def test_a_dense_model_dealt_out_to_experts_is_the_same(hidden: int) -> None:
    script = importlib.import_module("smollm2_as_mixture")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    dense = LlamaForCausalLM(config).eval()
    mixture = MixtralForCausalLM(script.mixture_config(dense.config, 3, hidden)).eval()
    script.deal_out(dense, mixture)
    torch.testing.assert_close(mixture(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
    assert mixture.model.layers[0].mlp.experts.down_proj.shape == (3, hidden, 8)


@pytest.mark.usefixtures("scripts")
@torch.no_grad()
def test_upcycled_experts_are_copies() -> None:
    script = importlib.import_module("train_upcycled_model")
    torch.manual_seed(0)
    ALL_EXPERTS_FUNCTIONS.register("sorted", script.sorted_experts)
    dense = script.make_model(script.model_config(32, num_experts=1, top_k=1))
    mixture = script.upcycle(dense, 4, 2)
    torch.testing.assert_close(mixture(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    assert script.similarity(mixture) == pytest.approx(1, abs=1e-5)


def test_claims() -> None:
    def row(method: str, bits: float, kl: float, **more: float) -> dict[str, Any]:
        return {"method": method, "bits": bits, "kl_text": kl, **more}

    rows = [
        row("original", 16, 0),
        row("GloBE", 3.99, 0.4, asked=4),
        row("GloBE", 2.99, 0.9, asked=3),
        row("GloBE, no bank", 2.99, 1.0, asked=3),
        row("GPTQ", 4, 1.0),
        row("GPTQ", 4.25, 0.5),
        row("GPTQ", 3.25, 2.0),
        row("GPTQ", 8, 0.01),
        row("QTIP", 4, 0.5, asked=4),
        row("WaterSIC", 4, 0.6, asked=4),
        row("QTIP", 3, 1.0, asked=3),
    ]
    found = judge_claims(rows, ["text"])
    assert [(claim.holds, claim.measured[:5]) for claim in found] == [
        (True, "0.800"),  # at 4 bits, of QTIP
        (False, "0.800"),  # of GPTQ with 4.25 bits
        (False, "0.900"),  # at 3 bits, of QTIP
        (True, "0.450"),  # of GPTQ with 3.25 bits
        (False, "0.900"),  # of itself without a bank
        (True, "0.800"),  # nowhere worse than GPTQ
    ]
    assert "QTIP 0.5 with 4.000 bits" in found[0].measured
