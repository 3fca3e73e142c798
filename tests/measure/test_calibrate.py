"""The calibration pass against sums over one token and one expert after the other, with finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from globe.checkpoint.digest import file_sha256
from globe.experts.metric import LayerStatistics
from globe.measure.calibrate import MOST_ENERGY, StoredStatistics, calibrate, save_statistics
from globe.model.expert_modules import find_experts
from globe.model.expert_run import routed_tokens, run_expert
from tests.conformance.families import SETTINGS
from tests.conformance.tiny import IDS
from tests.conformance.tiny import tiny_model as conformance_model
from tests.model.compressed import FAMILY_SETTINGS, LAYERS, D, E, P, tiny_model

LAYER = 1


def windows() -> Tensor:
    return torch.randint(0, 48, (3, 16), generator=torch.Generator().manual_seed(1))


def gpt_oss() -> nn.Module:
    """Transposed, interleaved and biased experts with a gate function of their own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=48, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, num_local_experts=E, intermediate_size=P, num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for experts in find_experts(model):
        nn.init.normal_(experts.module.gate_up_proj_bias, std=0.3)
        nn.init.normal_(experts.module.down_proj_bias, std=0.3)
    return model


def build(model_type: str) -> nn.Module:
    return gpt_oss() if model_type == "gpt_oss" else tiny_model(model_type)


def matrices(module: Any, expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gate, up and down (P, D) of an expert, and the biases of gate and up, in float64."""
    gate_up, down = module.gate_up_proj[expert].double(), module.down_proj[expert].double()
    bias = torch.zeros(2 * P, dtype=torch.float64)
    if module.is_transposed:
        gate_up, bias = gate_up.T, module.gate_up_proj_bias[expert].double()
        return gate_up[::2], gate_up[1::2], down, bias[::2], bias[1::2]
    return gate_up[:P], gate_up[P:], down.T, bias[:P], bias[P:]


def inner(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    """h from what the gate function is given, in the module's own order."""
    return module._apply_gate(torch.stack([gate, up], -1).flatten() if module.is_transposed else torch.cat([gate, up]))


@pytest.mark.parametrize("model_type", [*FAMILY_SETTINGS, "gpt_oss"])
@torch.no_grad()
def test_statistics_are_the_sums_over_tokens(model_type: str) -> None:
    model, caught = build(model_type), []
    module: Any = find_experts(model)[LAYER].module
    hook = module.register_forward_pre_hook(lambda _, arguments: caught.append(arguments))
    model(input_ids=windows())
    hook.remove()
    tokens, chosen, router_weights = (torch.cat(parts) for parts in zip(*caught, strict=True))

    counts, of_batches = torch.zeros(E), dict[tuple[int, int], list[Tensor]]()
    rows = {family: torch.zeros(E, P, dtype=torch.float64) for family in ("gate", "up", "down")}
    step = 1e-6
    routed = zip(tokens.double(), chosen.tolist(), router_weights.tolist(), strict=True)
    for place, (x, experts, weights) in enumerate(routed):
        for expert, weight in zip(experts, weights, strict=True):
            gate, up, down, gate_bias, up_bias = matrices(module, expert)
            a, u = gate @ x + gate_bias, up @ x + up_bias
            h = inner(module, a, u)
            by_gate = (inner(module, a + step, u) - inner(module, a - step, u)) / (2 * step)
            by_up = (inner(module, a, u + step) - inner(module, a, u - step)) / (2 * step)
            counts[expert] += 1
            of_batches.setdefault((place // (2 * windows().shape[1]), expert), []).append(weight * h)
            energy = down.square().sum(1)
            rows["gate"][expert] += weight**2 * by_gate**2 * energy
            rows["up"][expert] += weight**2 * by_up**2 * energy
            rows["down"][expert] += weight**2 * h**2

    moments = torch.zeros(E, P, P, dtype=torch.float64)
    for (_, expert), found in of_batches.items():  # no token counts for more than so many of the median one
        most = MOST_ENERGY * sorted(float(h @ h) for h in found)[(len(found) - 1) // 2]
        for h in found:
            moments[expert] += min(1.0, most / float(h @ h)) * torch.outer(h, h)
    found = calibrate(model, windows(), [LAYER], batch=2, inner=True)
    assert list(found) == [LAYER]
    assert calibrate(model, windows(), [LAYER], batch=2)[LAYER].inner is None
    statistics = found[LAYER]
    assert statistics.num_tokens == len(tokens) == 48
    torch.testing.assert_close(statistics.inputs, tokens.mT @ tokens / len(tokens))
    torch.testing.assert_close(statistics.counts, counts)
    assert statistics.inner is not None
    torch.testing.assert_close(statistics.inner.double(), moments, rtol=1e-4, atol=1e-6)
    for family, expected in rows.items():
        torch.testing.assert_close(statistics.rows[family].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", SETTINGS)
@torch.no_grad()
def test_the_experts_of_every_family_are_run_as_the_model_runs_them(family: str) -> None:
    """The router's weights times the outputs found here add up to what the experts module returns."""
    model, caught = conformance_model(family), []
    experts = find_experts(model)[-1]
    hook = experts.module.register_forward_hook(lambda _, arguments, output: caught.append((arguments, output)))
    model(input_ids=IDS, use_cache=False)
    hook.remove()
    ((arguments, output),) = caught
    tokens, chosen, weights = routed_tokens(experts.layout, arguments)
    expected = torch.zeros_like(tokens)
    for expert in range(experts.layout.num_experts):
        token, place = torch.where(chosen == expert)
        found = run_expert(experts, expert, tokens[token])
        expected.index_add_(0, token, weights[token, place, None] * found.outputs)
    if experts.layout.presorted:
        output = output[arguments[0].any(dim=1)]
    expected += tokens * weights.where(chosen >= experts.layout.num_experts, 0).sum(1, keepdim=True)
    torch.testing.assert_close(expected, output.view_as(expected), rtol=1e-4, atol=1e-6)
    statistics = calibrate(model, IDS, [experts.layer])[experts.layer]
    assert int(statistics.counts.sum()) == int((chosen < experts.layout.num_experts).sum())


def test_the_pass_leaves_the_model_alone() -> None:
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        before = model(input_ids=windows()).logits
        calibrate(model, windows(), range(LAYERS))
        assert torch.equal(model(input_ids=windows()).logits, before)
    assert not any(experts.module._forward_pre_hooks for experts in find_experts(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_is_summed_in_single() -> None:
    found = calibrate(tiny_model("qwen2_moe", torch.bfloat16), windows(), [LAYER])[LAYER]
    expected = calibrate(tiny_model("qwen2_moe"), windows(), [LAYER])[LAYER]
    assert found.inputs.dtype == torch.float32
    assert float((found.inputs - expected.inputs).norm() / expected.inputs.norm()) < 0.05


@pytest.mark.parametrize("inner", [False, True])
def test_statistics_survive_a_file(tmp_path: Path, inner: bool) -> None:
    model, path = tiny_model("qwen3_moe"), tmp_path / "statistics.safetensors"
    layers = calibrate(model, windows(), [0, 2], inner=inner)
    sizes = {experts.layer: experts.layout for experts in find_experts(model) if experts.layer in layers}
    assert save_statistics(path, sizes, layers.items(), inner=inner) == file_sha256(path)
    restored = StoredStatistics(path)
    assert list(restored) == [0, 2]
    for layer, expected in layers.items():
        check_equal(restored[layer], expected)
    with pytest.raises(KeyError):
        restored[1]


def check_equal(found: LayerStatistics, expected: LayerStatistics) -> None:
    assert found.num_tokens == expected.num_tokens
    for name in ("inputs", "counts"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert (found.inner is None) == (expected.inner is None)
    assert found.inner is None or torch.equal(found.inner, expected.inner)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(found.rows[family], rows) for family, rows in expected.rows.items())
