"""Healthy checkpoints with odd experts: zeros of block expansion, one expert, copies, weights far from 1."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from globe import CheckpointError, CompressConfig, SettingsError, compress, export_dense
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import REPORT
from globe.report.page import render
from tests.model.compressed import E, logits
from tests.model.compressed import tiny_model as dense_tiny_model
from tests.rounding import assert_equal_but_for_rounding
from tests.tiny_sources import write_source

QUICK = {"keep": 0.7, "steps": 2}
ALONE: dict[str, Any] = {"calibrate": "none", "allocation": "uniform"}


def write_odd(folder: Path, pattern: str, change: Callable[[Tensor], Any], dtype: torch.dtype = torch.float32) -> Path:
    """A tiny source with the expert tensors that match the pattern changed in place."""
    write_source(folder, "qwen3_moe", dtype=dtype)
    changed = 0
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if "mlp.experts" in name and re.search(pattern, name):
                change(tensors[name])
                changed += 1
        save_file(tensors, path, metadata={"format": "pt"})
    assert changed
    return folder


def check_output(source: Path, output: Path) -> dict[str, Any]:
    """The report is strict JSON and makes a page, zeros stay zeros, and the loaded model is its dense export."""

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    report = json.loads((output / REPORT).read_text(), parse_constant=refuse)
    assert 0 <= report["error"] <= 1
    assert "<svg" in render(output)
    dense = export_dense(output, output.with_name("dense"))
    before, after = open_checkpoint(source), open_checkpoint(dense)
    for name in before.tensors:
        if not before.read(name).any():
            assert not after.read(name).any(), name
    ours = logits(AutoModelForCausalLM.from_pretrained(output))
    assert_equal_but_for_rounding(ours, logits(AutoModelForCausalLM.from_pretrained(dense)))
    return report


ZEROS = {
    "a family": r"layers\.1\..*down_proj",
    "gate": r"layers\.0\..*gate_proj",
    "an expert": r"experts\.2\.",
    "a layer": r"layers\.1\.",
    "all layers": "",
}
WAYS: dict[str, dict[str, Any]] = {
    "shared": {"calibrate": "none"},
    "by family": {"share_families": False, "calibrate": "none"},
    "am": {"solver": "am", "share_families": False, **ALONE},
    "streamed": {"scope": "model", "stream": True, "share_families": False, **ALONE},
}


@pytest.mark.parametrize(
    ("zeros", "way"),
    [(zeros, "by family") for zeros in ZEROS]
    + [(z, way) for z in ("gate", "all layers") for way in WAYS if way != "by family"],
)
def test_zeros_are_fitted_exactly(tmp_path: Path, zeros: str, way: str) -> None:
    source = write_odd(tmp_path / "source", ZEROS[zeros], Tensor.zero_)
    compress(source, tmp_path / "out", CompressConfig(**QUICK, **WAYS[way]))
    for bank in check_output(source, tmp_path / "out")["banks"]:
        for layer, families in bank["errors"].items():
            for family, error in families.items():
                names = [f"layers.{layer}.mlp.experts.{expert}.{family}_proj" for expert in range(E)]
                assert (error == 0) == all(re.search(ZEROS[zeros], name) for name in names)
        errors = [error for families in bank["errors"].values() for error in families.values()]
        assert (bank["outcome"] == "zero") == (not any(errors))


@pytest.mark.parametrize("zeros", ["a family", "all layers"])
def test_zeros_are_calibrated_and_planned_with(tmp_path: Path, zeros: str) -> None:
    """The default run: what adds nothing has no importance and no sensitivity, and neither is divided by."""
    source = write_odd(tmp_path / "source", ZEROS[zeros], Tensor.zero_)
    compress(source, tmp_path / "out", CompressConfig(**QUICK))
    report = check_output(source, tmp_path / "out")
    assert report["calibration"] is not None
    assert report["uniform_because"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_an_expert_far_from_the_others_has_an_error_like_theirs(
    tmp_path: Path, scale: float, dtype: torch.dtype
) -> None:
    """Or they like its: adapters take up the scale of their expert, whichever is the fainter."""
    source = write_odd(tmp_path / "source", r"experts\.1\.", lambda tensor: tensor.mul_(scale), dtype)
    report = compress(source, tmp_path / "out", CompressConfig(**QUICK, **ALONE))
    for bank in report.banks:
        for families in bank.expert_errors.values():
            assert all(error < 0.9 for errors in families.values() for error in errors)


def test_what_the_dtype_of_the_factors_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = write_odd(tmp_path / "source", "", lambda tensor: tensor.mul_(1e30))
    with pytest.raises(SettingsError, match=r"layer 0 gate leave the range of float16: choose --factor-dtype bfloat16"):
        compress(source, tmp_path / "out", CompressConfig(**QUICK, **ALONE, factor_dtype="float16"))


def test_a_model_that_computes_nan_is_not_planned_with(tmp_path: Path) -> None:
    source = write_odd(tmp_path / "source", "", lambda tensor: tensor.mul_(1e30))
    with pytest.raises(CheckpointError, match="computes NaN"):
        compress(source, tmp_path / "out", CompressConfig(**QUICK, calibrate="none"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_are_still_refused_by_name(tmp_path: Path, value: float) -> None:
    source = write_odd(tmp_path / "source", r"layers\.1\..*experts\.3\.up", lambda tensor: tensor.fill_(value))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.3\.up_proj.* holds"):
        compress(source, tmp_path / "out", CompressConfig(**QUICK, **ALONE))


@pytest.mark.parametrize("settings", [{}, {"share_families": False}, {"scope": "model", "stream": True}], ids=str)
def test_one_expert_is_enough(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = dense_tiny_model("qwen3_moe").config
    config.num_experts = config.num_experts_per_tok = 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "out", CompressConfig(**QUICK, **settings))
    check_output(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("change", [lambda tensor: tensor.fill_(0.01), lambda tensor: tensor[1:4].zero_()])
def test_constant_experts_and_rows_of_zeros(tmp_path: Path, change: Callable[[Tensor], Any]) -> None:
    source = write_odd(tmp_path / "source", "", change)
    compress(source, tmp_path / "out", CompressConfig(**QUICK, calibrate="none"))
    check_output(source, tmp_path / "out")
