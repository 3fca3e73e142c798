"""Experts are put into a model where transformers keeps them, and errors are averaged as the report does."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from benchmarks.stacks import family_errors, write_stacks
from globe.terms import FAMILIES
from tests.random_experts import normal


def test_write_stacks() -> None:
    config = Qwen2MoeConfig(
        vocab_size=8,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=3,
        num_experts_per_tok=1,
        moe_intermediate_size=5,
        shared_expert_intermediate_size=4,
        intermediate_size=4,
    )
    model = Qwen2MoeForCausalLM(config)
    untouched = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    stacks = {(1, family): normal(3, 5, 12, seed=place).float() for place, family in enumerate(FAMILIES)}
    write_stacks(model, stacks)
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(experts.gate_up_proj, torch.cat([stacks[1, "gate"], stacks[1, "up"]], dim=1))
    assert torch.equal(experts.down_proj, stacks[1, "down"].mT)
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, untouched)


def test_family_errors() -> None:
    stacks = {(0, family): torch.ones(2, 3, 4) for family in FAMILIES}
    found = family_errors(stacks, {**stacks, (0, "up"): torch.full((2, 3, 4), 0.7)})
    assert found["gate"] == 0
    assert found["up"] == pytest.approx(0.3)
    assert found["error"] == pytest.approx(0.3 / 3**0.5)
