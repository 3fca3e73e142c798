"""Models of every format that do not fit into memory, judged a layer at a time."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from globe import CheckpointError, CompressConfig, EvaluateConfig, SettingsError, compress, evaluate
from globe.checkpoint.reader import open_checkpoint
from globe.cli.main import main
from globe.measure import runnable
from globe.measure.placed_model import place_model
from globe.measure.runnable import bytes_at_once
from globe.model.dense_view import dense_view
from globe.quant.coded import CodedExperts
from tests.coded import ALONE, LAYERS, D, E, P, write_source
from tests.tiny_sources import write_tokenizer

BANKS = CompressConfig(keep=0.7, steps=2, calibrate="none", allocation="uniform")
FORMATS = {
    "coded": ALONE,
    "banks": dataclasses.replace(BANKS, scope="model"),
    "mixed": dataclasses.replace(BANKS, families=("up",), layers=(1,)),
    "packed": dataclasses.replace(ALONE, bits=None, format="compressed-tensors"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, an output in each format, and a text."""
    folder = tmp_path_factory.mktemp("models")
    write_source(folder / "source")
    write_tokenizer(folder / "source", "".join(map(chr, range(65, 65 + 48))))
    letters = torch.randint(65, 65 + 48, (2000,), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text("".join(map(chr, letters.tolist())))
    for name, config in FORMATS.items():
        compress(folder / "source", folder / name, config)
    return folder


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runnable, "MEMORY_SHARE", 0.0)


def settings(models: Path, *tasks: str) -> EvaluateConfig:
    return EvaluateConfig(text=str(models / "text.txt"), length=32, max_tokens=500, batch=4, tasks=tasks)


@pytest.mark.parametrize(("name", "reference"), [*((name, "source") for name in FORMATS), ("source", "coded")])
def test_it_has_the_quality_of_the_model_that_is_loaded(
    models: Path, name: str, reference: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = evaluate(models / name, settings(models), models / reference)
    request.getfixturevalue("too_large")
    monkeypatch.setattr("globe.measure.placed_model.load", None)
    streamed = evaluate(models / name, settings(models), models / reference)
    assert loaded.kl is not None
    assert loaded.kl > 1e-5
    assert streamed.kl == pytest.approx(loaded.kl, rel=1e-4)
    assert streamed.perplexity == pytest.approx(loaded.perplexity, rel=1e-5)
    assert streamed.reference_perplexity == pytest.approx(loaded.reference_perplexity, rel=1e-5)
    assert (streamed.num_tokens, streamed.text) == (loaded.num_tokens, loaded.text)


def test_what_counts_is_the_memory_that_it_takes_as_it_is_stored(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runnable, "STREAMED_SHARE", 100.0)  # a layer is most of so small a model

    def is_streamed(name: str, memory: int) -> bool:
        monkeypatch.setattr(runnable, "total_memory", lambda _: (memory, "a small machine"))
        return place_model(models / name, "cpu").streamed is not None

    size = {name: sum(each.nbytes for each in open_checkpoint(models / name).tensors.values()) for name in FORMATS}
    dense = sum(each.nbytes for each in open_checkpoint(models / "source").tensors.values())
    assert size["coded"] < dense / 3
    for name in FORMATS:
        needed = dense if name == "packed" else size[name]  # whose experts are dequantised when it is loaded
        assert is_streamed(name, 2 * needed - 1)
        assert not is_streamed(name, 2 * needed)
    because = place_model(models / "coded", "cpu").because
    assert not because
    assert is_streamed("coded", size["coded"])
    assert (
        f"the model takes {size['coded'] / 1000:.2f} kB to run, over 50%"
        in place_model(models / "coded", "cpu").because
    )


def test_a_layer_of_composed_experts_counts_as_a_whole(models: Path) -> None:
    source, experts = open_checkpoint(models / "source"), 4 * 3 * E * P * D
    assert bytes_at_once(dense_view(open_checkpoint(models / "coded"))) == bytes_at_once(source) + experts
    assert bytes_at_once(dense_view(open_checkpoint(models / "packed"))) == bytes_at_once(source)


def test_a_gpu_that_is_too_small_has_a_layer_of_it_at_a_time(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runnable, "STREAMED_SHARE", 100.0)
    monkeypatch.setattr(runnable, "total_memory", lambda device: (10**9 if device == "cpu" else 10**5, device))
    monkeypatch.setattr("globe.measure.placed_model.usable_device", lambda device: device)
    placed = place_model(models / "coded", "cuda")
    assert placed.streamed is not None
    assert placed.device == "cuda"


def test_a_family_is_decoded_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, count = CodedExperts.decode, 0

    def counted(coded: CodedExperts, experts: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal count
        count += 1
        return decode(coded, experts)

    view = dense_view(open_checkpoint(models / "coded"))
    monkeypatch.setattr(CodedExperts, "decode", counted)
    names = [name for layer in range(LAYERS) for name in sorted(view.tensors) if f"layers.{layer}." in name]
    for name, tensor in view.read_many(names):
        assert tuple(tensor.shape) == view.tensors[name].shape
    assert count == 3 * LAYERS


@pytest.mark.usefixtures("too_large")
def test_the_terminal_says_so(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = "--text", str(models / "text.txt"), "--length", "32", "--max-tokens", "64"
    assert main(["evaluate", str(models / "coded"), *few, "--prompt", "ABC"]) == 0
    printed = capsys.readouterr().out
    for what in ("what it is compared with", "the model"):
        told = f"note: {what} ran a layer at a time, in float32 (and does not continue the prompt): the model takes"
        assert told in printed
    assert "ABC" not in printed


@pytest.mark.usefixtures("too_large")
def test_tasks_need_a_model_that_fits(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("globe.measure.evaluate.Tasks", lambda names: names)
    monkeypatch.setattr("globe.measure.placed_model.StreamedModel", None)
    with pytest.raises(SettingsError, match=r"coded would not be \(the model takes .*: leave --tasks out"):
        evaluate(models / "coded", settings(models, "arc"))


@pytest.mark.usefixtures("too_large")
def test_a_copy_that_does_not_tell_of_its_source_is_told_what_it_lacks(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "coded", tmp_path / "copy")
    (tmp_path / "copy" / "globe_source.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"globe_source\.json is not there, and tells how the source was arranged"
    ):
        evaluate(tmp_path / "copy", settings(models), verify=False)
