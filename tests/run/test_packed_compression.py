"""Experts in the format of compressed-tensors: what is stored, what it stands for, and who can read it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from globe import CompressConfig, SettingsError, UnsupportedModelError, compress, export_dense
from globe.checkpoint.card import CARD
from globe.checkpoint.manifest import verify_files
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import is_compressed
from globe.measure.reference import source_reference
from globe.measure.sensitivity import Sensitivities
from globe.model.loading import load
from globe.model.source import open_source
from globe.report.page import render
from globe.run.job import make_job
from globe.run.outline import outline
from globe.run.rounding import RoundingPlan, plan_rounding
from globe.run.size import bits_to_fit, compress_within
from globe.terms import FAMILIES
from tests.coded import LAYERS, D, E, P, write_source
from tests.model.compressed import logits
from tests.tiny_sources import write_source as write_tiny

WEIGHTS = LAYERS * 3 * E * P * D
GROUP = 32
LEAST = 4 + 16 / GROUP + 8 * 16 / (P * D)
"""Bits of a weight: its number, its part of a scale, and of a matrix' shape."""
PACKED = CompressConfig(format="compressed-tensors", calibrate="none", allocation="uniform")
MIXED = dataclasses.replace(PACKED, bits=7)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "source"
    write_source(folder, torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def mixed(source: Path) -> Path:
    compress(source, source.with_name("mixed"), MIXED)
    return source.with_name("mixed")


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def section(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def widths(folder: Path) -> dict[int, int]:
    """Bits by layer, as the targets of config.json say."""
    found: dict[int, int] = {}
    for group in section(folder)["config_groups"].values():
        for layer in range(LAYERS):
            name = f"model.layers.{layer}.mlp.experts.{E - 1}.up_proj"
            if any(re.match(target.removeprefix("re:"), name) for target in group["targets"]):
                assert layer not in found
                found[layer] = group["weights"]["num_bits"]
    return found


def unpacked(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """A number at a time: (rows, columns), float32."""
    words, scales = tensors[f"{name}_packed"], tensors[f"{name}_scale"]
    rows, columns = tensors[f"{name}_shape"].tolist()
    matrix = torch.empty(rows, columns)
    for row in range(rows):
        line = b"".join(int(word).to_bytes(4, "little", signed=True) for word in words[row])
        all_bits = int.from_bytes(line, "little")
        for column in range(columns):
            number = (all_bits >> bits * column & (1 << bits) - 1) - (1 << bits - 1)
            matrix[row, column] = number * scales[row, column // GROUP].float()
    return matrix


def test_what_is_stored_is_the_budget_and_no_other_tensor_has_changed(source: Path, mixed: Path) -> None:
    before, after = stored(source), stored(mixed)
    routed = {name for name in before if ".experts." in name}
    assert after.keys() - before.keys() == {
        f"{name}_{part}" for name in routed for part in ("packed", "scale", "shape")
    }
    assert before.keys() - after.keys() == routed
    assert all(torch.equal(after[name], before[name]) for name in before.keys() & after.keys())
    num_bytes = sum(after[name].nbytes for name in after.keys() - before.keys())
    assert sorted(widths(mixed).values()) == [4, 8]
    assert 8 * num_bytes / WEIGHTS == pytest.approx(LEAST + 2)
    index = json.loads((mixed / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == after.keys()
    assert verify_files(mixed).num_files > 0


def test_it_is_read_as_what_it_stands_for_and_near_the_source(source: Path, mixed: Path) -> None:
    tensors, view, original = stored(mixed), open_source(mixed), open_checkpoint(source)
    for layer, bits in widths(mixed).items():
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.3.{projection}.weight"
            meant = unpacked(tensors, name, bits)
            assert torch.equal(view.read(name), meant.bfloat16())
            true = original.read(name).float()
            assert float((meant - true).norm() / true.norm()) < (0.13 if bits == 4 else 0.008)


def test_it_loads_and_is_exported_without_any_package(source: Path, mixed: Path, tmp_path: Path) -> None:
    dense = export_dense(mixed, tmp_path / "dense")
    assert open_checkpoint(dense).tensors.keys() == open_checkpoint(source).tensors.keys()
    assert open_checkpoint(dense).shards == open_checkpoint(source).shards
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert torch.equal(logits(load(mixed)), logits(load(dense)))
    page = render(mixed)
    assert "Where the bits went" in page
    assert "do not tell all" not in page
    assert is_compressed(mixed)
    reference = source_reference(mixed)
    assert reference is not None
    assert reference.is_original


def test_without_bits_all_layers_have_four_and_the_card_says_what_it_is(source: Path, tmp_path: Path) -> None:
    report = compress(source, tmp_path / "four", PACKED)
    assert report.bits == pytest.approx(LEAST)
    assert len(section(tmp_path / "four")["config_groups"]) == 1
    assert set(widths(tmp_path / "four").values()) == {4}
    card = (tmp_path / "four" / CARD).read_text()
    assert "A lossy copy of" in card
    assert "import globe" not in card
    assert any("32 inputs" in note for note in report.notes)


@pytest.mark.parametrize("dear", range(LAYERS))
def test_the_layer_whose_errors_cost_most_gets_eight_bits(source: Path, dear: int) -> None:
    job = make_job(source, MIXED)
    outputs = {"gate": P, "up": P, "down": D}
    sensitivities: Sensitivities = {
        (layer, family): torch.full((E, outputs[family]), 9.0 if layer == dear else 1.0)
        for layer in range(LAYERS)
        for family in FAMILIES
    }
    plan = plan_rounding(job, None, sensitivities)
    assert {layer for layer, bits in plan.widths.items() if bits == 8} == {dear}
    assert plan.num_bytes == pytest.approx((LEAST + 2) * WEIGHTS / 8)
    assert RoundingPlan.from_json(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


def test_statistics_of_the_model_make_it_better(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "blind", PACKED)
    compress(source, tmp_path / "measured", CompressConfig(format="compressed-tensors"))
    original = logits(load(source))
    blind, measured = (float((logits(load(tmp_path / name)) - original).norm()) for name in ("blind", "measured"))
    assert measured < 0.9 * blind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "with their scales, 4 bits take 4.563 here"),
        ({"bits": 12}, "from 1.5 to 10"),
        ({"bits": None, "keep": 0.5, "allocation": "sensitivity"}, "leave out keep"),
        ({"families": ("down",)}, "leave out keep, the ratios and families"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        compress(source, tmp_path / "out", dataclasses.replace(PACKED, **changes))


def test_the_largest_that_fits_is_found(source: Path) -> None:
    outlined = outline(source, PACKED)
    beside = outlined.predicted_bytes(outlined.scopes) - outlined.config.budget.num_bytes(WEIGHTS)
    assert bits_to_fit(outlined, beside + 6 * WEIGHTS / 8 + 8) == pytest.approx(6, abs=0.011)
    with pytest.raises(SettingsError, match=r"in 4\.563 bits, the least"):
        bits_to_fit(outlined, beside + 4 * WEIGHTS / 8)


def test_a_loss_is_not_looked_for_in_it(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="GloBE's own format"):
        compress_within(source, tmp_path / "out", 0.1, PACKED)


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", "qwen2_moe", "fused")
    with pytest.raises(UnsupportedModelError, match="all experts in one tensor"):
        compress(tmp_path / "source", tmp_path / "out", PACKED)
