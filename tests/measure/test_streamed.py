"""A model run a layer at a time against the same model loaded as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from globe.errors import CheckpointError, UnsupportedModelError
from globe.measure.calibrate import calibrate
from globe.measure.sensitivity import measure_sensitivities
from globe.measure.streamed import KeptStates, calibrate_streamed, sensitivities_streamed
from globe.model.expert_modules import find_experts
from globe.model.loading import load
from globe.model.source import open_source
from globe.model.streamed import StreamedModel
from globe.terms import FAMILIES
from tests.conformance.tiny import Case, write

WINDOWS = torch.randint(3, 48, (5, 12), generator=torch.Generator().manual_seed(3))
CASES = [
    Case("qwen3_moe", "saved"),
    Case("mixtral", "fused"),
    Case("deepseek_v3", "saved"),
    Case("deepseek_v4", "saved"),
    Case("gpt_oss", "fused"),
    Case("qwen3_next", "saved"),
    Case("jamba", "saved"),
    Case("longcat_flash", "saved"),
    Case("qwen3_5_moe", "saved"),
    Case("llama4", "fused"),
]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_at_a_time_gives_what_the_whole_model_gives(tmp_path: Path, case: Case, dtype: torch.dtype) -> None:
    write(case, tmp_path, dtype)
    whole = load(tmp_path, "cpu", torch.float32)
    layers = [experts.layer for experts in find_experts(whole)][:2]
    statistics = calibrate(whole, WINDOWS, layers, batch=2, inner=True)
    sensitivities = measure_sensitivities(whole, WINDOWS[::2], layers, seed=4)
    model = StreamedModel(open_source(tmp_path), "cpu")
    with contextlib.closing(KeptStates(tmp_path, 2)) as kept:
        found = dict(calibrate_streamed(model, WINDOWS, layers, kept, batch=2, inner=True))
        squares = sensitivities_streamed(model, WINDOWS, layers, kept, seed=4)
    assert list(found) == layers
    for layer, expected in statistics.items():
        assert found[layer].num_tokens == expected.num_tokens
        assert torch.equal(found[layer].counts, expected.counts)
        assert_close(found[layer].inputs, expected.inputs)
        assert found[layer].inner is not None
        assert expected.inner is not None
        assert_close(found[layer].inner, expected.inner)
        for family in FAMILIES:
            assert_close(found[layer].rows[family], expected.rows[family])
    assert squares.keys() == sensitivities.keys()
    for key, each in sensitivities.items():
        assert_close(squares[key], each)


def test_layers_are_read_in_turn_once_forward_and_once_backward_and_experts_when_they_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Case("olmoe", "saved"), tmp_path)
    checkpoint, read = open_source(tmp_path), list[str]()
    original = type(checkpoint).read_many

    def counted(self: Any, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in original(self, names):
            read.append(name)
            yield name, tensor

    monkeypatch.setattr(type(checkpoint), "read_many", counted)
    model = StreamedModel(checkpoint, "cpu")
    parameters = dict(model.model.named_parameters())
    outside = [name for name in checkpoint.tensors if ".layers." not in name]
    assert sorted(read) == sorted(outside)
    assert {name for name, parameter in parameters.items() if not parameter.is_meta} == set(outside)
    with contextlib.closing(KeptStates(tmp_path)) as kept:
        for layer, _ in calibrate_streamed(model, WINDOWS, (0, 2), kept, batch=2):
            assert {int(name.split(".")[2]) for name in read if name not in outside} == set(range(layer + 1))
            assert all(each.is_meta for name, each in model.model.named_parameters() if ".layers." in name)
        experts = {name for name in checkpoint.tensors if ".experts." in name}
        others = [name for name in checkpoint.tensors if name not in outside and name not in experts]
        assert sorted(set(read)) == sorted(checkpoint.tensors)
        assert sorted(name for name in read if name not in experts) == sorted(outside + others)
        assert all(1 <= read.count(name) <= 3 for name in experts)  # batches of windows
        del read[:]
        sensitivities_streamed(model, WINDOWS, (1, 2), kept, batch=2)
    again = [name for name in others if not name.startswith("model.layers.0.")]
    assert sorted(name for name in read if name not in experts) == sorted(again)
    numbers = [int(name.split(".")[2]) for name in read]
    assert numbers == sorted(numbers, reverse=True)


def test_layers_with_something_between_them_are_refused(tmp_path: Path) -> None:
    write(Case("mixtral", "fused"), tmp_path)
    model = StreamedModel(open_source(tmp_path), "cpu")
    model.model.model.layers[1].register_forward_pre_hook(lambda _, arguments: (2 * arguments[0], *arguments[1:]))
    with pytest.raises(UnsupportedModelError, match="something stands between its layers"):
        model.enter(WINDOWS, 2)


def test_a_lacking_tensor_is_named(tmp_path: Path) -> None:
    write(Case("mixtral", "fused"), tmp_path)
    checkpoint = open_source(tmp_path)
    for name, said in (
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers.1.mlp.gate.weight", "mlp.gate.weight"),
    ):
        held = checkpoint.tensors.pop(name)
        with pytest.raises(CheckpointError, match=said), StreamedModel(checkpoint, "cpu").layer(1):
            pass
        checkpoint.tensors[name] = held


def test_numbers_that_are_none_are_found_out(tmp_path: Path) -> None:
    case = write(Case("mixtral", "fused"), tmp_path)
    with torch.no_grad():
        case.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("nan")
    case.save_pretrained(tmp_path)
    model = StreamedModel(open_source(tmp_path), "cpu")
    with contextlib.closing(KeptStates(tmp_path)) as kept:
        with pytest.raises(CheckpointError, match="layer 2 compute with NaN"):
            list(calibrate_streamed(model, WINDOWS, (2,), kept))
        list(calibrate_streamed(model, WINDOWS, (), kept))
        with pytest.raises(CheckpointError, match="NaN or infinite values in float32"):
            sensitivities_streamed(model, WINDOWS, (0,), kept)
