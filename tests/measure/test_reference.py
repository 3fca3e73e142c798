from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from globe import CheckpointError, CompressConfig, EvaluateConfig, compress, evaluate
from globe.checkpoint.manifest import MANIFEST
from globe.cli.main import main
from globe.measure.reference import source_reference
from tests.tiny_sources import write_source, write_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


@dataclasses.dataclass(frozen=True)
class Models:
    """A source, what was compressed from it, and a text."""

    source: Path
    small: Path
    text: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        return str(self.small), "--text", str(self.text), "--length", "32", "--max-tokens", "64"

    @property
    def config(self) -> EvaluateConfig:
        return EvaluateConfig(text=str(self.text), length=32, max_tokens=64)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    write_source(tmp_path / "source", layout="fused")
    write_tokenizer(tmp_path / "source", LETTERS)
    (tmp_path / "text.txt").write_text("a line of letters, and one more.\n" * 40)
    settings = CompressConfig(keep=0.7, steps=2, calibrate="none", allocation="uniform")
    compress(tmp_path / "source", tmp_path / "small", settings)
    return Models(tmp_path / "source", tmp_path / "small", tmp_path / "text.txt")


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["evaluate", *arguments])
    printed = capsys.readouterr()
    return status, " ".join(printed.out.split()), " ".join(printed.err.split())


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "experts" in name)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, folder / "model.safetensors", {"format": "pt"})


def name_source(models: Models, source: object) -> None:
    path = models.small / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "source": source}))
    (models.small / MANIFEST).unlink(missing_ok=True)  # or the change would be found by it


def test_the_source_is_the_original(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ((), ("--reference", str(models.source))):
        status, out, _ = evaluated(capsys, *models.arguments, *more)
        assert status == 0
        assert "KL to the original" in out
        assert f"original: {models.source}" in out
    assert evaluate(models.small, models.config, models.source).reference == "the original"


def test_a_copy_of_the_source_is_the_original_too(models: Models) -> None:
    shutil.copytree(models.source, models.source.with_name("copy"))
    assert evaluate(models.small, models.config, models.source.with_name("copy")).reference == "the original"


def test_another_model_is_named(
    models: Models, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shutil.copytree(models.source, models.source.with_name("other"))
    change_weights(models.source.with_name("other"))
    other = str(models.source.with_name("other"))
    status, out, _ = evaluated(capsys, *models.arguments, "--reference", other)
    assert status == 0
    assert f"KL to {other} (nats per token)" in out
    assert "original" not in out
    assert evaluate(models.small, models.config, other).reference == other
    assert evaluate(models.small, models.config).reference is None


@pytest.mark.parametrize("source", ["nowhere/at-all", "owner/name", "/dev", "/proc/self", "a\0b", "", ".", "[/x]"])
def test_a_report_names_nothing_to_be_loaded(
    models: Models, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(models.text.parent)
    name_source(models, source)
    status, out, _ = evaluated(capsys, *models.arguments)
    assert status == 0
    assert "note: compared with nothing: " in out
    assert "KL" not in out


def test_a_source_that_changed_is_not_compared_with(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    change_weights(models.source)
    with pytest.raises(CheckpointError, match="is not, or no longer, the model from which"):
        source_reference(models.small)
    status, out, _ = evaluated(capsys, *models.arguments)
    assert status == 0
    assert f"note: compared with nothing: {models.source} is not, or no longer, the model" in out
    assert "KL" not in out


def test_nothing_of_a_source_that_is_another_model_is_loaded(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models.source, models.source.with_name("other"))
    change_weights(models.source.with_name("other"))
    name_source(models, str(models.source.with_name("other")))
    loaded: list[str] = []
    load = __import__("globe.measure.placed_model", fromlist=["load"]).load
    monkeypatch.setattr(
        "globe.measure.placed_model.load", lambda model, device: loaded.append(str(model)) or load(model, device)
    )
    assert evaluated(capsys, *models.arguments)[0] == 0
    assert loaded == [str(models.small)]


def test_a_tokenizer_that_reads_the_text_otherwise_is_refused(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    other = models.source.with_name("other")
    shutil.copytree(models.source, other)
    change_weights(other)
    write_tokenizer(other, LETTERS[::-1])
    status, _, err = evaluated(capsys, *models.arguments, "--reference", str(other))
    assert status == 1
    assert "their tokenizers read the same text differently" in err
    with pytest.raises(CheckpointError, match="read the same text differently"):
        evaluate(models.small, models.config, other)


@pytest.mark.parametrize("vocabulary", [40, 64])
def test_a_vocabulary_of_another_size_is_refused(
    models: Models, capsys: pytest.CaptureFixture[str], vocabulary: int
) -> None:
    from transformers import AutoModelForCausalLM

    other = models.source.with_name("other")
    model = AutoModelForCausalLM.from_pretrained(models.source)
    model.resize_token_embeddings(vocabulary)
    model.save_pretrained(other)
    write_tokenizer(other, LETTERS)
    status, _, err = evaluated(capsys, *models.arguments, "--reference", str(other))
    assert status == 1
    assert f"one of 48 tokens and the reference one of {vocabulary}" in err


def test_a_reference_that_cannot_be_opened_is_an_error(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = evaluated(capsys, *models.arguments, "--reference", "./nowhere")
    assert status == 1
    assert "does not exist" in err
    assert evaluated(capsys, *models.arguments, "--reference", "none")[0] == 0
