"""A model with composed experts kept against the same without."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from globe import SettingsError, UnsupportedModelError, set_compose_cache
from globe.model import bank_module
from globe.model.compose_cache import split_budget
from tests.model.compressed import LAYERS, D, E, P, logits, tiny_model, token_ids
from tests.model.conftest import Make
from tests.model.test_runtime import OFFLOADED
from tests.rounding import assert_equal_but_for_rounding

EXPERT = 3 * P * D * 4
ALL = LAYERS * E * EXPERT


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal but for rounding: matrices are laid out in another way, or composed beside others."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@functools.cache
def pair(path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model to give a cache, afresh for each use, and the same model without."""
    model = load(path)
    return model, copy.deepcopy(model)


calls = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.lists(st.lists(st.integers(0, E), min_size=2, max_size=2, unique=True), max_size=5),
    ),
    min_size=1,
    max_size=12,
)


def states(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(index))
    return torch.randn(len(index), D, generator=generator), index, torch.rand(index.shape, generator=generator)


@given(
    st.sampled_from(["per_layer", "up_only", "shared_and_own"]),
    st.integers(0, ALL + EXPERT),
    st.sampled_from([3000, 2**28]),
    calls,
)
def test_any_calls_in_any_order_give_the_same_outputs(
    compressed: Make, banks: str, budget: int, working_bytes: int, calls: list[tuple[int, list[list[int]]]]
) -> None:
    """Whatever the budget and however the work is cut up; indices of E stand for other devices' experts."""
    model, plain = pair(compressed("qwen2_moe", banks).path)
    cache = set_compose_cache(model, budget)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(bank_module, "WORKING_BYTES", working_bytes)
        for layer, index in calls:
            inputs = states(torch.tensor(index, dtype=torch.int64).view(-1, 2))
            experts, without = (one.model.layers[layer].mlp.experts for one in (model, plain))
            assert_same(experts(*inputs), without(*inputs))
            assert cache.resident_bytes <= budget


@given(st.integers(1, ALL), calls)
def test_hits_and_the_experts_kept_are_those_of_a_naive_cache(
    compressed: Make, budget: int, calls: list[tuple[int, list[list[int]]]]
) -> None:
    model = pair(compressed("qwen2_moe", "per_layer").path)[0]
    cache = set_compose_cache(model, budget)
    whole, rest = divmod(budget // EXPERT, LAYERS)
    kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(LAYERS)]
    hits = misses = 0
    with torch.no_grad():
        for layer, index in calls:
            model.model.layers[layer].mlp.experts(*states(torch.tensor(index, dtype=torch.int64).view(-1, 2)))
            needed = sorted({expert for row in index for expert in row if expert < E})
            present = [expert for expert in needed if expert in kept[layer]]
            hits, misses = hits + len(present), misses + len(needed) - len(present)
            for expert in present:
                kept[layer].move_to_end(expert)
            for expert in sorted(set(needed) - set(present)):
                room = whole + (layer < rest)
                if room and len(kept[layer]) >= room and next(iter(kept[layer])) not in needed:
                    kept[layer].popitem(last=False)
                if len(kept[layer]) < room:
                    kept[layer][expert] = None
    assert (cache.hits, cache.misses) == (hits, misses)
    for layer, wanted in zip(model.model.layers, kept, strict=True):
        own = layer.mlp.experts.globe_cache
        assert set(own.slots_of(range(E))) == set(wanted)


@given(st.integers(0, 200), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=4))
def test_the_budget_is_dealt_out_evenly_and_never_exceeded(num_bytes: int, sizes: list[tuple[int, int]]) -> None:
    shares = split_budget(num_bytes, sizes)
    assert sum(shares) <= num_bytes
    slots = [share // size for share, (_, size) in zip(shares, sizes, strict=True)]
    assert all(slot <= num_experts for slot, (num_experts, _) in zip(slots, sizes, strict=True))
    spare = num_bytes - sum(shares)
    for slot, (num_experts, size) in zip(slots, sizes, strict=True):
        assert slot == num_experts or size > spare
        if len({size for _, size in sizes}) == 1:
            assert all(slot >= other - 1 or slot == num_experts for other in slots)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
@pytest.mark.parametrize("budget", [ALL // 2, ALL])
def test_generation_is_the_same(compressed: Make, model_type: str, budget: int) -> None:
    model = load(compressed(model_type).path)
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(token_ids(), **settings)
    cache = set_compose_cache(model, budget)
    assert torch.equal(model.generate(token_ids(), **settings), expected)
    assert 0 < cache.resident_bytes <= budget
    cache.reset_counts()
    assert torch.equal(model.generate(token_ids(), **settings), expected)
    assert cache.hit_rate == 1 if budget == ALL else 0 < cache.hit_rate < 1


def test_inference_mode_and_no_grad_take_turns(compressed: Make) -> None:
    model = load(compressed("qwen2_moe").path)
    expected = logits(model)
    set_compose_cache(model, ALL // 2)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(model(token_ids()).logits, expected)


def test_changed_factors_are_composed_again(compressed: Make) -> None:
    """In place, by training through `.data`, by other tensors, by a change of dtype and back."""
    model = load(compressed("qwen2_moe").path)
    plain = copy.deepcopy(model)
    cache = set_compose_cache(model, ALL)

    def agree() -> None:
        assert_same(logits(model), logits(plain), tolerance=1e-5 if model.dtype != torch.bfloat16 else 0.05)

    agree()
    for one in (model, plain):
        with torch.no_grad():
            next(iter(one.model.globe_banks.values())).bases.mul_(1.5)
    agree()
    for one in (model, plain):
        one.train()
        one.model.layers[1].mlp.experts.globe_down_codes.data.mul_(0.5)
        one.eval()
    agree()
    state = {name: tensor + 0.01 for name, tensor in plain.state_dict().items()}
    for one in (model, plain):
        one.load_state_dict(state, assign=True)
    agree()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        plain.to(dtype)
        assert cache.resident_bytes == 0
        agree()
        assert cache.resident_bytes <= ALL


def test_training_takes_no_notice_of_it(compressed: Make) -> None:
    model = load(compressed("qwen2_moe").path)
    cache = set_compose_cache(model, ALL)
    logits(model)
    assert cache.resident_bytes > 0
    model.train()
    assert cache.resident_bytes == 0
    model(token_ids(), labels=token_ids()).loss.backward()
    assert cache.resident_bytes == 0
    model.eval()(token_ids(), labels=token_ids()).loss.backward()
    assert cache.resident_bytes == 0
    assert model.model.layers[0].mlp.experts.globe_down_codes.grad is not None


def test_nothing_is_saved(compressed: Make, tmp_path: Path) -> None:
    model = load(compressed("qwen2_moe").path)
    names, expected = model.state_dict().keys(), logits(model)
    set_compose_cache(model, ALL)
    logits(model)
    assert model.state_dict().keys() == names
    model.save_pretrained(tmp_path)
    assert_equal_but_for_rounding(logits(load(tmp_path)), expected)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_offloaded_layers_keep_nothing(compressed: Make, tmp_path: Path) -> None:
    path = compressed("qwen2_moe", "per_layer").path
    device_map = OFFLOADED | {"model.layers.1": "cpu", "model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=tmp_path)
    held = [not layer.mlp.experts.globe_down_codes.is_meta for layer in model.model.layers]
    cache = set_compose_cache(model, ALL)
    assert len(cache.layers) == sum(held) < LAYERS
    for _ in range(2):
        assert_same(logits(model), logits(load(path)))


def test_what_cannot_be_done_is_refused(compressed: Make) -> None:
    with pytest.raises(SettingsError, match="-1 bytes"):
        set_compose_cache(load(compressed("qwen2_moe").path), -1)
    with pytest.raises(UnsupportedModelError, match="no experts compressed by GloBE"):
        set_compose_cache(tiny_model("qwen2_moe"), ALL)
    with torch.inference_mode():
        made_inside = copy.deepcopy(load(compressed("qwen2_moe").path))
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        set_compose_cache(made_inside, ALL)
