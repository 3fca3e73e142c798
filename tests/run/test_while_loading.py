"""Dense models compressed while transformers loads them."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from globe import CheckpointError, CompressConfig, GlobeConfig, SettingsError, compress
from globe.checkpoint.manifest import verify_model
from globe.checkpoint.report import Report
from globe.model.quantization_config import GlobeQuantizationConfig
from tests.coded import ALONE, write_source
from tests.model.compressed import logits

SETTINGS = {"bits": 3, "calibrate": "none", "allocation": "uniform"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("while_loading") / "source"
    write_source(folder)
    return folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("settings", [SETTINGS, {"keep": 0.7, "steps": 2, "scope": "model", "calibrate": "none"}])
def test_it_is_the_model_that_compress_writes(source: Path, temporary: Path, settings: dict[str, object]) -> None:
    compress(source, temporary / "small", dataclasses.replace(ALONE, **{"bits": None, **settings}))
    expected = AutoModelForCausalLM.from_pretrained(temporary / "small")
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=GlobeConfig(**settings))
    assert torch.equal(logits(loaded), logits(expected))
    assert isinstance(loaded.config.quantization_config, GlobeQuantizationConfig)
    assert [*temporary.iterdir()] == [temporary / "small"]
    loaded.save_pretrained(temporary / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(temporary / "saved")), logits(expected))


def test_a_named_output_is_kept_and_used_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GlobeConfig(output=tmp_path / "small", **SETTINGS)
    first = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    verify_model(tmp_path / "small")
    assert Report.read(tmp_path / "small").bits == pytest.approx(3, abs=0.02)
    monkeypatch.setattr("globe.run.compress.prepare", None)
    again = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert torch.equal(logits(first), logits(again))


def test_what_is_calibrated_runs_in_a_process_that_is_loading(source: Path, temporary: Path) -> None:
    config = GlobeConfig(bits=3)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype="float32", quantization_config=config)
    compress(source, temporary / "small", CompressConfig(bits=3))
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(temporary / "small")))


def test_what_cannot_be_is_said(source: Path, temporary: Path) -> None:
    with pytest.raises(SettingsError, match="bits is 99"):
        GlobeConfig(bits=99)
    with pytest.raises(SettingsError, match="format compressed-tensors is not for loading"):
        GlobeConfig(format="compressed-tensors")
    with pytest.raises(SettingsError, match=r"device_map 'auto' may spread"):
        AutoModelForCausalLM.from_pretrained(source, device_map="auto", quantization_config=GlobeConfig(**SETTINGS))
    with pytest.raises(SettingsError, match="layers"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=GlobeConfig(layers=(7,), **SETTINGS))
    assert not [*temporary.iterdir()]


def test_files_that_are_loaded_in_spite_of_it_are_noticed(
    source: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    load = PreTrainedModel._load_pretrained_model
    dense = [str(path) for path in sorted(source.glob("*.safetensors"))]
    monkeypatch.setattr(
        PreTrainedModel,
        "_load_pretrained_model",
        staticmethod(lambda model, state, _, settings: load(model, state, dense, settings)),
    )
    with pytest.raises(CheckpointError, match=r"lacks .*globe_"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=GlobeConfig(**SETTINGS))
    assert not [*temporary.iterdir()]
