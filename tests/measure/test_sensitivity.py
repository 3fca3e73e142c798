from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from globe.checkpoint.digest import file_sha256
from globe.measure.sensitivity import (
    Sensitivities,
    load_sensitivities,
    measure_sensitivities,
    random_windows,
    save_sensitivities,
)
from globe.model.expert_modules import find_experts
from globe.model.loading import load
from globe.terms import Family
from tests.conformance.tiny import tiny_model
from tests.random_experts import normal
from tests.tiny_sources import write_source


@torch.no_grad()
def divergence(model: torch.nn.Module, other: torch.nn.Module, windows: torch.Tensor) -> float:
    log_p, log_q = (m(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_sensitivities_predict_what_small_noise_does(tmp_path: Path, model_type: str) -> None:
    write_source(tmp_path, model_type, "fused")
    model = load(tmp_path, "cpu", torch.float32)
    windows = random_windows(model, seed=0)
    assert windows.max() < 48
    found = measure_sensitivities(model, windows, {0, 2})
    assert found.keys() == {(layer, family) for layer in (0, 2) for family in ("gate", "up", "down")}
    assert all(parameter.grad is None for parameter in model.parameters())
    noise, predicted, measured = 0.01, 0.0, 0.0  # in the last layer, where it cannot change what a router chooses
    for family, name in (("down", "down_proj"), ("gate", "gate_up_proj"), ("up", "gate_up_proj")):
        for seed in range(4):
            other = copy.deepcopy(model)
            matrix = other.get_submodule("model.layers.2.mlp.experts").get_parameter(name).data
            part = matrix if family == "down" else matrix.chunk(2, dim=1)[family == "up"]
            generator = torch.Generator().manual_seed(seed)
            part += noise * part.square().mean().sqrt() * torch.randn(part.shape, generator=generator)
            measured += divergence(model, other, windows) / 4
        predicted += float(found[2, family].sum()) * noise**2
    assert 0.7 < predicted / measured < 1.4


def matrices(model_type: str, gate_up: Tensor, down: Tensor) -> dict[Family, Tensor]:
    """By family (E, inputs, outputs): as torch.nn.Linear stores them, or, of gpt_oss and Llama 4, products from the
    left, of gpt_oss gate and up in turns."""
    if model_type == "gpt_oss":
        return {"gate": gate_up[:, :, ::2], "up": gate_up[:, :, 1::2], "down": down}
    if model_type == "llama4_text":
        gate, up = gate_up.chunk(2, dim=2)
        return {"gate": gate, "up": up, "down": down}
    gate, up = gate_up[: len(down)].chunk(2, dim=1)  # LongCat has unused rows for its identity experts
    return {"gate": gate.mT, "up": up.mT, "down": down.mT}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash"])
def test_sensitivities_are_squared_gradients_by_output(model_type: str) -> None:
    """Against autograd in float64, window after window and output after output."""
    model = tiny_model(model_type, torch.float64)
    model.set_experts_implementation("eager")  # the others do not take float64
    windows = torch.randint(3, 48, (3, 7), generator=torch.Generator().manual_seed(1))
    *_, experts = find_experts(model)
    found = measure_sensitivities(model, windows, {experts.layer}, seed=5)
    stacked = [experts.module.get_parameter(name).requires_grad_() for name in ("gate_up_proj", "down_proj")]
    weights = matrices(model_type, *(parameter.detach() for parameter in stacked))
    hidden = model.config.hidden_size
    assert {family: X.shape[2] == hidden for family, X in weights.items()} == {"gate": False, "up": False, "down": True}
    expected: dict[Family, Tensor] = {
        family: torch.zeros(len(X), X.shape[2], dtype=X.dtype) for family, X in weights.items()
    }
    generator = torch.Generator().manual_seed(5)
    for window in windows:
        log_p = model(input_ids=window[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        sampled = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(log_p.gather(1, sampled).sum(), stacked)
        for family, gradient in matrices(model_type, *gradients).items():
            variance = weights[family].square().mean()
            for expert in range(len(gradient)):
                for k in range(gradient.shape[2]):
                    column = gradient[expert, :, k]
                    expected[family][expert, k] += 0.5 * variance * (column @ column) / (3 * 6)
    assert found.keys() == {(experts.layer, family) for family in expected}
    for family, each in expected.items():
        torch.testing.assert_close(found[experts.layer, family], each)
        assert bool((each > 0).any())


def test_saved_sensitivities_are_read_back_layer_after_layer(tmp_path: Path) -> None:
    kept: Sensitivities = {
        (layer, family): normal(3, 4, seed=layer).float() for layer in (2, 10) for family in ("gate", "down")
    }
    path = tmp_path / "sensitivities.safetensors"
    assert save_sensitivities(path, kept) == file_sha256(path)
    again = load_sensitivities(path)
    assert list(again) == list(kept)
    assert all(torch.equal(again[key], each) for key, each in kept.items())
