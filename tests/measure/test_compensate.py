"""What a layer makes up for, against whole models and regressions that are written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from globe.checkpoint.gate_up import split_gate_up
from globe.measure.compensate import MOST_ENERGY, RIDGE, Compensation, Correction, shrunk
from globe.model.expert_modules import RoutedExperts, find_experts
from globe.model.expert_run import routed_tokens
from globe.model.loading import load
from globe.model.source import open_source
from globe.model.streamed import StreamedModel
from globe.terms import FAMILIES, Family
from tests.conformance.tiny import Case, write
from tests.random_experts import normal

WINDOWS = torch.randint(3, 48, (6, 16), generator=torch.Generator().manual_seed(3))
CASES = [
    Case("qwen3_moe", "saved"),
    Case("mixtral", "fused"),
    Case("deepseek_v3", "saved"),
    Case("gpt_oss", "fused"),
    Case("llama4", "fused"),
    Case("granitemoe", "saved"),
]


def matrices(experts: RoutedExperts) -> dict[Family, Tensor]:
    """Views of a module's families, (E, P, D)."""
    layout = experts.layout
    gate_up, down = (experts.module.get_parameter(name)[: layout.num_experts] for name in ("gate_up_proj", "down_proj"))
    gate_up, down = (gate_up.mT, down) if layout.is_transposed else (gate_up, down.mT)
    gate, up = split_gate_up(gate_up, 1, interleaved=not layout.is_concatenated)
    return dict(zip(FAMILIES, (gate, up, down), strict=True))


def worse(matrix: Tensor, seed: int) -> Tensor:
    """With errors of a fifth of it."""
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed))
    return matrix + 0.2 * matrix.square().mean().sqrt() * noise


@torch.no_grad()
def behind(model: Any, layer: int) -> Tensor:
    """The output of a layer on the windows, (T, D)."""
    found = list[Tensor]()
    module = next(each for name, each in model.named_modules() if name.endswith(f"layers.{layer}"))
    handle = module.register_forward_hook(lambda _module, _arguments, output: found.append(output))
    model(input_ids=WINDOWS, use_cache=False)
    handle.remove()
    return found[0].flatten(0, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_a_correction_is_the_ridge_regression_that_is_written_down(tmp_path: Path, case: Case) -> None:
    write(case, tmp_path, torch.float32)
    original, coded = (load(tmp_path, "cpu", torch.float32) for _ in range(2))
    experts = {each.layer: each for each in find_experts(coded)}
    first, second = [*experts][:2]
    compensation = Compensation(StreamedModel(open_source(tmp_path), "cpu"), WINDOWS, batch=2)

    def code(layer: int, families: tuple[Family, ...]) -> dict[Family, Tensor]:
        own = matrices(experts[layer])
        for place, family in enumerate(families):
            own[family].copy_(worse(own[family], 10 * layer + place))
        return {family: own[family].clone() for family in families}

    compensation.go_through(first, code(first, FAMILIES))
    halves = code(second, ("gate", "up"))
    found = compensation.correction(second, halves)
    assert found is not None
    expected = naive(original, coded, experts[second])
    torch.testing.assert_close(found.down, expected.down, rtol=1e-3, atol=1e-3 * float(expected.down.abs().max()))
    assert found.share == pytest.approx(expected.share, abs=1e-3)
    matrices(experts[second])["down"].add_(found.down)
    compensation.go_through(second, {**halves, "down": matrices(experts[second])["down"]})
    hidden = torch.cat(compensation._coded.hidden).flatten(0, 1)
    torch.testing.assert_close(hidden, behind(coded, second), rtol=1e-4, atol=1e-4)


def naive(original: Any, coded: Any, experts: RoutedExperts) -> Correction:
    """Expert after expert in float64, outputs of experts by one-hot vectors for down."""
    calls = list[tuple[Tensor, ...]]()
    handle = experts.module.register_forward_pre_hook(lambda _module, arguments: calls.append(arguments))
    missing = behind(original, experts.layer).double() - behind(coded, experts.layer).double()
    handle.remove()
    (arguments,) = calls
    scale = coded.config.residual_multiplier if coded.config.model_type.startswith("granite") else 1.0
    missing /= scale
    before = missing.square().sum(1, keepdim=True)
    counted = (MOST_ENERGY * before.median() / before).clamp(max=1).sqrt()
    down = torch.zeros_like(matrices(experts)["down"]).double()
    E, P, _ = down.shape
    x, chosen, weights = routed_tokens(experts.layout, arguments)
    tokens = torch.arange(len(x))
    if experts.layout.presorted:
        tokens = torch.where(arguments[0].any(1))[0] % (len(arguments[0]) // E)
    for expert in range(E):
        rows, places = torch.where(chosen == expert)
        who = tokens[rows]
        units = weights[rows, places, None].double() * _units(experts, expert, x[rows]).double()
        inputs, outputs = counted[who] * units, counted[who] * missing[who]
        odd = who // WINDOWS.shape[1] % 2 == 1
        ridge = RIDGE * inputs.square().sum() / P * torch.eye(P, dtype=torch.float64)

        def solved(half: Tensor, share: float, inputs: Tensor = inputs, outputs: Tensor = outputs) -> Tensor:
            mine, theirs = inputs[half], outputs[half]
            return torch.linalg.inv(mine.mT @ mine + share * ridge) @ mine.mT @ theirs  # noqa: B023

        if not len(rows):
            continue
        predicted = torch.zeros_like(outputs)
        predicted[odd], predicted[~odd] = inputs[odd] @ solved(~odd, 0.5), inputs[~odd] @ solved(odd, 0.5)
        energy = float(predicted.square().sum())
        part = min(1.0, max(0.0, float((predicted * outputs).sum()) / energy)) if energy else 0.0
        down[expert] = part * solved(torch.ones_like(odd), 1.0)
        missing[who] -= units @ down[expert]
    after = (counted * missing).square().sum() / (counted.square() * before).sum()
    return Correction(down.float(), 1 - float(after))


def _units(experts: RoutedExperts, expert: int, x: Tensor) -> Tensor:
    """h (T, P): what an expert gives where its down is a part of the identity."""
    module, E = experts.module, experts.layout.num_experts
    down = matrices(experts)["down"]
    kept, (P, D) = down[expert].clone(), down[expert].shape
    bias = module.get_parameter("down_proj_bias")[expert].clone() if experts.layout.has_bias else 0.0
    parts: list[Tensor] = []
    for start in range(0, P, D):
        down[expert] = torch.eye(P, D).roll(start, 0) if P <= D else torch.eye(P)[:, start : start + D]
        if experts.layout.presorted:
            repeated = torch.zeros(E, len(x), D)
            repeated[expert] = x
            found = module(repeated.flatten(0, 1)).view(E, len(x), D)[expert]
        else:
            chosen = torch.full((len(x), 1), expert)
            found = module(x, chosen, torch.ones(len(x), 1)).view(len(x), D) - bias
        parts.append(found[:, :P])
    down[expert] = kept
    return torch.cat(parts, 1)[:, :P]


@pytest.mark.parametrize("num_tokens", [2, 9, 24, 31, 200])
def test_a_regression_is_the_same_by_tokens_and_by_inputs(num_tokens: int) -> None:
    """Fewer tokens than the 24 inputs, as many, more of them than one half has, more in all: against float64."""
    inputs, outputs = normal(num_tokens, 24, seed=1), normal(num_tokens, 10, seed=2) + 0.5 * normal(1, 10, seed=3)
    outputs += inputs @ normal(24, 10, seed=4)
    is_odd = torch.arange(num_tokens) % 2 == 1
    ridge = RIDGE * (inputs.mT @ inputs).diagonal().mean()

    def regression(tokens: Tensor, share: float) -> Tensor:
        x, eye = inputs[tokens], torch.eye(24, dtype=torch.float64)
        return torch.linalg.lstsq(
            torch.cat([x, (share * ridge).sqrt() * eye]), torch.cat([outputs[tokens], torch.zeros(24, 10).double()])
        ).solution

    gained, energy = 0.0, 0.0
    for half in (is_odd, ~is_odd):
        foretold = inputs[~half] @ regression(half, 0.5)
        gained, energy = gained + (foretold * outputs[~half]).sum(), energy + foretold.square().sum()
    expected = (gained / energy).clamp(0, 1) * regression(torch.ones_like(is_odd), 1.0)
    torch.testing.assert_close(shrunk(inputs, outputs, is_odd), expected, rtol=1e-9, atol=1e-9)
    found = shrunk(inputs.float(), outputs.float(), is_odd).double()
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-6


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_too_few_tokens_to_judge_by_correct_nothing(num_tokens: int) -> None:
    found = shrunk(torch.ones(num_tokens, 5), torch.ones(num_tokens, 3), torch.zeros(num_tokens, dtype=torch.bool))
    assert torch.equal(found, torch.zeros(5, 3))


def test_where_a_norm_follows_the_experts_nothing_is_corrected(tmp_path: Path) -> None:
    write(Case("qwen3_moe", "saved"), tmp_path, torch.float32)
    model = StreamedModel(open_source(tmp_path), "cpu")
    (layer, experts), *_ = model.experts.items()
    compensation = Compensation(model, WINDOWS)
    block: Any = model.model.get_submodule(experts.path.rpartition(".")[0])
    block.register_forward_hook(lambda _module, _arguments, output: output.tanh())
    assert compensation.correction(layer, {}) is None
