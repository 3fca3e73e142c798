"""lm-eval's tasks: what is asked of it, and where its scores are told. lm-eval itself is tested in tests/servers."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from globe import CompressConfig, EvaluateConfig, SettingsError, SweepConfig, compress, evaluate, sweep
from globe.checkpoint.evaluation import TaskScore, read_evaluations
from globe.checkpoint.manifest import verify_files
from globe.cli.main import main
from globe.report.page import render
from globe.sweeps.view import table_csv
from tests.tiny_sources import write_source, write_tokenizer

LITTLE = CompressConfig(keep=0.7, steps=1, calibrate="none", allocation="uniform")


class FakeConfig:
    """lm-eval's settings, with two tasks to be found."""

    def __init__(self, tasks: list[str]) -> None:
        self.tasks = tasks

    def process_tasks(self) -> str:
        if missing := [task for task in self.tasks if task not in ("arc", "wiki")]:
            raise ValueError(f"Tasks not found: {', '.join(missing)}")
        return "manager"


def fake_evaluate(model: Any, tasks: list[str], task_manager: str, log_samples: bool) -> dict[str, Any]:
    """Scores that tell the models apart."""
    assert (task_manager, log_samples) == ("manager", False)
    size = float(next(iter(model.pretrained.parameters())).numel())
    found = {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc,strict": size, "sample_len": 7},
        "wiki": {"alias": "wiki", "bits_per_byte,none": 2.5, "bits_per_byte_stderr,none": "N/A"},
    }
    return {"results": {task: found[task] for task in tasks}}


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "lm_eval": {},
        "lm_eval.config": {},
        "lm_eval.config.evaluate_config": {"EvaluatorConfig": FakeConfig},
        "lm_eval.evaluator": {"simple_evaluate": fake_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **given: SimpleNamespace(**given)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a source, an output of it, and a text."""
    write_source(tmp_path / "source")
    write_tokenizer(tmp_path / "source", "abcdefghijklmnopqrstuvwxyz .,\n")
    (tmp_path / "text.txt").write_text("a line of letters, and one more.\n" * 40)
    compress(tmp_path / "source", tmp_path / "small", LITTLE)
    return tmp_path


def settings(models: Path, *tasks: str) -> EvaluateConfig:
    return EvaluateConfig(text=str(models / "text.txt"), length=32, max_tokens=64, tasks=tasks)


def test_names_are_separated_by_commas_or_given_one_by_one() -> None:
    assert EvaluateConfig(tasks=("arc,wiki", "more,")).tasks == ("arc", "wiki", "more")


@pytest.mark.usefixtures("lm_eval")
def test_scores_of_both_models_are_recorded_and_told(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = models / "small"
    found = evaluate(small, settings(models, "arc", "wiki"), models / "source")
    accuracy, strict, bits = found.tasks
    assert accuracy == TaskScore("arc", "acc", 0.5, 0.1, 0.5)
    assert (strict.metric, strict.error) == ("acc, strict", None)
    assert bits == TaskScore("wiki", "bits_per_byte", 2.5, None, 2.5)
    assert read_evaluations(small) == [found]
    verify_files(small)
    assert "| arc (acc) | 0.50000 ± 0.10000 | 0.5000 | the original |" in (small / "README.md").read_text()
    results = ModelCard.load(small / "README.md").data.eval_results
    assert [(each.dataset_name, each.metric_value) for each in results if each.metric_type == "acc"] == [("arc", 0.5)]
    page = render(small)
    assert '<th scope="row">arc (acc)</th><td>0.50000 ± 0.10000</td><td>0.5000</td>' in page
    assert main(["compare", str(small)]) == 0
    assert "wiki (bits_per_byte)" in capsys.readouterr().out


@pytest.mark.usefixtures("lm_eval")
def test_tasks_stay_when_others_are_run(models: Path) -> None:
    for tasks in (("arc",), ("wiki",), ()):
        evaluate(models / "small", settings(models, *tasks), models / "source")
    (kept,) = read_evaluations(models / "small")
    assert [score.task for score in kept.tasks] == ["arc", "arc", "wiki"]


@pytest.mark.usefixtures("lm_eval")
def test_there_is_no_score_beside_it_where_only_logits_of_the_reference_are_kept(models: Path) -> None:
    logits = models / "logits.safetensors"
    found = evaluate(models / "small", settings(models, "wiki"), models / "source", reference_logits=logits)
    assert found.kl is not None
    assert found.tasks == [TaskScore("wiki", "bits_per_byte", 2.5)]


@pytest.mark.usefixtures("lm_eval")
def test_the_terminal_tells_them(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = "--text", str(models / "text.txt"), "--length", "32", "--max-tokens", "64"
    assert main(["evaluate", str(models / "small"), *few, "--tasks", "arc,wiki"]) == 0
    assert "arc (acc)" in capsys.readouterr().out


@pytest.mark.usefixtures("lm_eval")
def test_a_sweep_has_a_column_for_each(models: Path) -> None:
    grid = SweepConfig(keep=(0.7, 0.8), common=LITTLE, evaluate=settings(models, "arc"))
    for _ in range(2):  # the second time all is read from the records
        found = sweep(models / "source", models / "sweep", grid)
        rows = list(csv.DictReader(io.StringIO(table_csv(found).decode())))
        assert [float(row["arc (acc)"]) for row in rows] == [0.5] * 3
        assert all(
            point.evaluation is not None and point.evaluation.tasks[0].reference == 0.5 for point in found.points
        )


@pytest.mark.usefixtures("lm_eval")
def test_a_task_that_lm_eval_does_not_have_is_said_before_the_model_is_loaded(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("globe.measure.placed_model.load", None)
    with pytest.raises(SettingsError, match=r"Tasks not found: archery; `lm-eval ls tasks`"):
        evaluate(models / "small", settings(models, "arc,archery"), models / "source")


def test_without_lm_eval_it_says_what_to_install(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SettingsError, match=r"pip install 'lm-eval\[hf\]'"):
        evaluate(models / "small", settings(models, "arc"))
