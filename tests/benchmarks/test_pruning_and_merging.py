"""REAP and REAM on a tiny model against routing by hand, and the assignment against all permutations."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import numpy as np
import pytest
import torch

from benchmarks.calibration import calibrate
from benchmarks.rivals.assignment import assign
from benchmarks.rivals.ream import align, group, ream
from benchmarks.rivals.reap import kept_experts, reap
from benchmarks.stacks import remove_experts, write_stacks
from globe.errors import SettingsError
from globe.terms import FAMILIES
from tests.benchmarks.calibrated import invented
from tests.model.compressed import LAYERS, D, E, P, tiny_model
from tests.random_experts import normal

F32 = torch.float32


def model_stacks(model: torch.nn.Module) -> dict:
    stacks = {}
    for layer in range(LAYERS):
        experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        stacks |= {(layer, "gate"): gate, (layer, "up"): up, (layer, "down"): experts.down_proj.detach().mT}
    return {key: stack.clone() for key, stack in stacks.items()}


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
@torch.no_grad()
def test_removed_experts_get_no_tokens(model_type: str) -> None:
    pruned, masked = tiny_model(model_type), tiny_model(model_type)
    kept = {0: torch.tensor([1, 2, 5]), 2: torch.tensor([0, 3])}
    remove_experts(pruned, kept)
    for layer, experts in kept.items():
        gone = torch.tensor([expert for expert in range(E) if expert not in experts])
        router = masked.get_submodule(f"model.layers.{layer}.mlp.gate")
        forward, top_k = router.forward, router.top_k

        def without(hidden: torch.Tensor, router=router, forward=forward, gone=gone, top_k=top_k) -> tuple:
            logits = forward(hidden)[0].index_fill(1, gone, -torch.inf)
            weights, chosen = logits.softmax(-1).topk(top_k)
            if getattr(router, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, chosen

        router.forward = without
    ids = torch.arange(12)[None]
    torch.testing.assert_close(pruned(input_ids=ids).logits, masked(input_ids=ids).logits)
    assert pruned.model.layers[2].mlp.experts.gate_up_proj.shape == (2, 2 * P, D)


def test_the_most_salient_experts_stay() -> None:
    calibration = invented(5, 3, 4, layers=(0, 1, 2))
    kept = kept_experts(calibration, 0.5)  # 7.5 of 15: two in every layer, and one more
    assert sorted(len(experts) for experts in kept.values()) == [2, 2, 3]
    for layer, experts in kept.items():
        saliency = calibration.layers[layer].saliency
        best = sorted(range(5), key=lambda expert: -float(saliency[expert]))[: len(experts)]
        assert experts.tolist() == sorted(best)
    with pytest.raises(SettingsError, match="leaves none"):
        kept_experts(calibration, 0.1)


def test_reap_leaves_what_it_keeps() -> None:
    stacks = {(layer, family): normal(5, 3, 4, seed=layer, dtype=F32) for layer in (0, 1) for family in FAMILIES}
    found = reap(stacks, 0.6, F32, invented(5, 3, 4, layers=(0, 1)))
    assert found.stored_parameters == 0.6 * sum(stack.numel() for stack in stacks.values())
    for (layer, family), stack in stacks.items():
        for expert in range(5):
            kept = expert in found.kept_experts[layer]
            assert torch.equal(found.stacks[layer, family][expert], stack[expert] * kept)


def test_assignment_is_the_cheapest_permutation() -> None:
    for seed in range(20):
        size = 2 + seed % 5
        cost = np.random.default_rng(seed).normal(size=(size, size))
        found = assign(cost)
        assert sorted(found) == list(range(size))
        cheapest = min(cost[range(size), order].sum() for order in permutations(range(size)))
        assert cost[range(size), found].sum() == pytest.approx(cheapest)


def test_alignment_undoes_a_permutation() -> None:
    centroid = {family: normal(P, D, seed=place, dtype=F32) for place, family in enumerate(FAMILIES)}
    order = torch.randperm(P, generator=torch.Generator().manual_seed(0))
    member = {family: expert[order] for family, expert in centroid.items()}
    found = align(centroid, member, invented(2, P, D).layers[0].inputs)
    for family in FAMILIES:
        assert torch.equal(member[family][found], centroid[family])


def test_groups_take_the_most_similar() -> None:
    similarity = torch.tensor([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0.1], [0.1, 0.3, 1, 0.8], [0.2, 0.1, 0.8, 1]])
    statistics = dataclasses.replace(
        invented(4, 3, 4).layers[0],
        saliency=torch.tensor([4.0, 1, 3, 2]),
        output_similarity=similarity,
        logit_similarity=similarity,
    )
    assert group(statistics, torch.tensor([0, 2])) == {0: [1, 3], 2: []}


@torch.no_grad()
def test_merging_copies_changes_nothing() -> None:
    """Permuted copies of the centroid are merged into it; the router's weights add up to 1 before and after."""
    model = tiny_model("mixtral")
    stacks = model_stacks(model)
    for (layer, _), stack in stacks.items():
        for expert in range(1, E):
            order = torch.randperm(P, generator=torch.Generator().manual_seed(layer * E + expert))
            stack[expert] = stack[0][order]
    write_stacks(model, stacks)
    ids = torch.arange(24).view(2, 12)
    before = model(input_ids=ids).logits
    found = ream(stacks, 0.5, F32, calibrate(model, ids, range(LAYERS)))
    for key, stack in stacks.items():
        torch.testing.assert_close(found.stacks[key], stack)
    write_stacks(model, found.stacks)
    remove_experts(model, found.kept_experts)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert found.stored_parameters == 0.5 * sum(stack.numel() for stack in stacks.values())
