"""The calibration pass against sums over one token and one expert after the other."""

from __future__ import annotations

import pytest
import torch

from benchmarks.calibration import DAMPING, Calibration, calibrate, damped
from tests.model.compressed import D, E, P, tiny_model
from tests.random_experts import second_moment

LAYER = 1


@pytest.fixture(scope="module")
def seen() -> tuple[list[torch.Tensor], torch.nn.Module]:
    """What reached the experts of a layer: tokens, choices and weights, and the layer's block."""
    model, caught = tiny_model("qwen3_moe"), []
    block = model.get_submodule(f"model.layers.{LAYER}.mlp")
    hook = block.experts.register_forward_pre_hook(lambda _, arguments: caught.append(arguments))
    with torch.no_grad():
        model(input_ids=windows())
    hook.remove()
    return [torch.cat(parts) for parts in zip(*caught, strict=True)], block


def windows() -> torch.Tensor:
    return torch.randint(0, 48, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def found() -> Calibration:
    return calibrate(tiny_model("qwen3_moe"), windows(), [LAYER], batch=2)


def expert_forward(block: torch.nn.Module, expert: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = block.experts.gate_up_proj[expert].chunk(2)
    h = torch.nn.functional.silu(gate @ x) * (up @ x)
    return h, block.experts.down_proj[expert] @ h


@torch.no_grad()
def test_statistics(seen: tuple[list[torch.Tensor], torch.nn.Module], found: Calibration) -> None:
    (tokens, chosen, weights), block = seen
    statistics = found.layers[LAYER]
    assert found.num_tokens == len(tokens) == 48
    counts, saliency, inner = torch.zeros(E), torch.zeros(E), torch.zeros(E, P, P)
    outputs = torch.zeros(E, len(tokens), D)
    logits = tokens @ block.gate.weight.mT
    for place, x in enumerate(tokens):
        for expert in range(E):
            h, output = expert_forward(block, expert, x)
            outputs[expert, place] = logits[place].softmax(0)[expert] * output
            if expert in chosen[place]:
                gate = weights[place, chosen[place].tolist().index(expert)]
                counts[expert] += 1
                saliency[expert] += gate * output.norm()
                inner[expert] += torch.outer(h, h)
    mean = inner.sum(0) / counts.sum()
    expected = torch.stack([(inner[e] + P * mean) / (counts[e] + P) for e in range(E)])
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(statistics.counts, counts)
    torch.testing.assert_close(statistics.saliency, saliency / counts.clamp_min(1))  # an expert gets no token
    torch.testing.assert_close(statistics.inputs, tokens.mT @ tokens / len(tokens))
    torch.testing.assert_close(statistics.inner, expected, rtol=1e-4, atol=1e-5)
    pairs = cosine(outputs.flatten(1)[:, None], outputs.flatten(1)[None], dim=-1)
    torch.testing.assert_close(statistics.output_similarity, pairs, rtol=1e-4, atol=1e-5)
    pairs = cosine(logits.mT[:, None], logits.mT[None], dim=-1)
    torch.testing.assert_close(statistics.logit_similarity, pairs, rtol=1e-4, atol=1e-5)


def test_only_the_layers_asked_for(found: Calibration) -> None:
    assert list(found.layers) == [LAYER]
    assert found.moment(LAYER, "up").shape == (1, D, D)
    assert found.moment(LAYER, "down").shape == (E, P, P)


def test_damped() -> None:
    moment = torch.stack([second_moment(5, seed=seed) for seed in range(2)])
    for before, after in zip(moment, damped(moment), strict=True):
        torch.testing.assert_close(after - before, DAMPING * before.trace() / 5 * torch.eye(5, dtype=before.dtype))
