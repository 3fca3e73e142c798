"""What was measured of a model stays with it: record, card, page, comparison, and the logits of the original."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from globe import CheckpointError, CompressConfig, EvaluateConfig, OutputError, SettingsError, compress, evaluate
from globe.checkpoint import writer
from globe.checkpoint.evaluation import EVALUATION, read_evaluations
from globe.checkpoint.manifest import verify_files
from globe.cli.main import main
from globe.report.compare import comparison_table, read_candidates
from globe.report.page import render
from globe.run.export import export_dense
from tests.tiny_sources import write_source, write_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"
LITTLE = CompressConfig(keep=0.7, steps=1, calibrate="none", allocation="uniform")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, two outputs of it, and a text."""
    folder = tmp_path_factory.mktemp("recorded")
    write_source(folder / "source", layout="fused")
    write_tokenizer(folder / "source", LETTERS)
    (folder / "text.txt").write_text("a line of letters, and one more.\n" * 40)
    compress(folder / "source", folder / "large", LITTLE)
    compress(folder / "source", folder / "small", dataclasses.replace(LITTLE, keep=0.5))
    return folder


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "models")
    return tmp_path / "models"


def settings(models: Path, **changes: object) -> EvaluateConfig:
    return dataclasses.replace(EvaluateConfig(text=str(models / "text.txt"), length=32, max_tokens=128), **changes)


def test_an_evaluation_is_recorded_and_told_and_the_folder_verifies(models: Path) -> None:
    small = models / "small"
    evaluate(small, settings(models, max_tokens=64))
    found = evaluate(small, settings(models), models / "source")
    again = evaluate(small, settings(models), models / "source")
    assert again == found
    records = read_evaluations(small)
    assert [(each.num_tokens, each.kl is None) for each in records] == [(62, True), (124, False)]
    assert records[1] == found
    assert found.reference == "the original"
    assert found.text == "text.txt"
    assert found.kl_error is not None
    verify_files(small)

    card = ModelCard.load(small / "README.md")
    assert card.data.license is None
    results = {(each.dataset_name, each.metric_type): each.metric_value for each in card.data.eval_results or []}
    assert results[("text.txt", "kl")] == found.kl
    assert results[("text.txt", "perplexity")] == found.perplexity
    assert card.text.count("## Measured") == 1
    assert f"| {found.kl:.5f} ± {found.kl_error:.5f} | the original |" in card.text
    assert f"{found.kl:.5f} ± {found.kl_error:.5f}" in render(small)
    export_dense(small, models / "dense")
    assert f"{found.kl:.5f} ± {found.kl_error:.5f}" in (models / "dense" / "README.md").read_text()
    assert not (models / "dense" / EVALUATION).exists()


def test_an_edited_card_keeps_what_people_wrote(models: Path) -> None:
    small = models / "small"
    card = (small / "README.md").read_text()
    (small / "README.md").write_text(card.replace("## Use", "Mine.\n\n## Use"))
    evaluate(small, settings(models))
    told = (small / "README.md").read_text()
    assert "Mine." in told
    assert "## Measured" in told
    (small / "README.md").write_text("# All mine")
    evaluate(small, settings(models))
    assert (small / "README.md").read_text() == "# All mine"


def test_what_cannot_be_recorded_is_measured_all_the_same(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OutputError("no room")

    monkeypatch.setattr("globe.measure.evaluate.keep_evaluation", full)
    given = ("--text", models / "text.txt", "--length", 32, "--max-tokens", 64)
    assert main([str(each) for each in ("evaluate", models / "small", *given)]) == 0
    assert "not recorded: no room" in capsys.readouterr().out


def test_a_record_that_is_none_is_named(models: Path) -> None:
    (models / "small" / EVALUATION).write_text('{"evaluations": [{"perplexity": "low"}]}')
    with pytest.raises(CheckpointError, match=r"evaluation\.json: evaluations\[0\]\.perplexity is 'low'"):
        read_evaluations(models / "small")


def test_kept_logits_stand_for_the_original_to_the_last_bit(models: Path) -> None:
    logits = models / "logits.safetensors"
    with pytest.raises(SettingsError, match="is not there: name the reference"):
        evaluate(models / "small", settings(models), reference_logits=logits)
    plain = evaluate(models / "small", settings(models), models / "source")
    assert evaluate(models / "small", settings(models), models / "source", reference_logits=logits) == plain
    assert logits.stat().st_size == pytest.approx(4 * 31 * 48 * 4, abs=1000)
    shutil.move(models / "source", models / "elsewhere")
    assert evaluate(models / "small", settings(models), reference_logits=logits) == plain
    large = evaluate(models / "large", settings(models), reference_logits=logits)
    assert large.kl is not None
    assert plain.kl is not None
    assert large.kl < plain.kl
    assert large == evaluate(models / "large", settings(models), models / "elsewhere")


def test_logits_of_something_else_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = models / "logits.safetensors"
    evaluate(models / "small", settings(models), models / "source", reference_logits=logits)
    with pytest.raises(SettingsError, match="which is another text than"):
        evaluate(models / "small", settings(models, length=16), reference_logits=logits)
    with pytest.raises(SettingsError, match="which is another reference than"):
        evaluate(models / "small", settings(models), models / "large", reference_logits=logits)
    with pytest.raises(CheckpointError, match="holds no logits"):
        evaluate(models / "small", settings(models), reference_logits=next((models / "small").glob("model-*")))
    monkeypatch.setattr(writer, "_free", lambda _: 100)
    with pytest.raises(OutputError, match=r"needs 23\.\d\d kB, 100 B are free"):
        evaluate(models / "small", settings(models), models / "source", reference_logits=models / "more.safetensors")


def test_outputs_are_compared_from_their_records(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [models / "small", models / "large"]
    with_none = comparison_table(read_candidates(folders))
    assert with_none.row_count == 3
    for folder in folders:
        evaluate(folder, settings(models), models / "source")
    evaluate(folders[0], settings(models, max_tokens=64), models / "source")
    shutil.rmtree(models / "source")
    assert main(["compare", *map(str, folders), "-o", str(models / "compare.svg")]) == 0
    out = capsys.readouterr().out
    assert "124 tokens of text.txt" in out
    for folder in folders:
        found = read_evaluations(folder)[0]
        assert re.search(rf"{folder.name} .*{found.kl:.5f} ± .*{found.perplexity:.3f}", out)
    drawn = (models / "compare.svg").read_text()
    assert "<svg" in drawn
    assert main(["compare", *map(str, folders), "-o", str(models / "compare.what")]) == 1
    assert "choose png, svg or pdf" in capsys.readouterr().err
    report = models / "large" / "report.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "fingerprint": "another"}))
    assert main(["compare", *map(str, folders)]) == 1
    assert "different sources" in capsys.readouterr().err
