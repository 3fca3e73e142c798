from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from globe.measure.sensitivity import measure_sensitivities, random_windows
from globe.model.loading import load
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
