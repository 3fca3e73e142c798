"""lm-eval's model `hf` on the native format, both ways, on the dense export, and by evaluate: the same scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from globe import EvaluateConfig, evaluate, export_dense
from globe.checkpoint.shipped import MODEL
from globe.measure.texts import read_text
from tests.servers.exports import shipped

TASK = """
task: heldout
dataset_path: json
dataset_kwargs:
  data_files:
    test: {texts}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
GLOBE = ("-m", "globe", "lm-eval")
LM_EVAL = ("-m", "lm_eval")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of its own: to predict three pieces of the held-out text."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = read_text("heldout")
    pieces = [json.dumps({"text": text[start : start + 1500]}) for start in (0, 50_000, 100_000)]
    (folder / "texts.jsonl").write_text("\n".join(pieces))
    (folder / "heldout.yaml").write_text(TASK.format(texts=folder / "texts.jsonl"))
    return folder


def scores(tasks: Path, command: tuple[str, ...], model: Path, *flags: str) -> dict[str, float]:
    output = tasks.parent / "scores"
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={model}", "--tasks", "heldout", *flags]
    places = ["--include_path", tasks, "--output_path", output / "scores.json", "--device", "cpu"]
    home = {"HF_HOME": str(tasks.parent / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *command, *arguments, *places],
        capture_output=True,
        text=True,
        env=os.environ | home,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (written,) = output.glob("*.json")
    found = json.loads(written.read_text())["results"]["heldout"]
    written.unlink()
    return {name: value for name, value in found.items() if name.endswith(",none") and "stderr" not in name}


def test_scores_are_those_of_the_dense_export(tasks: Path, tmp_path: Path) -> None:
    small = shipped(tmp_path)
    dense = scores(tasks, LM_EVAL, export_dense(small, tmp_path / "dense"))
    assert 0.5 < dense["bits_per_byte,none"] < 2  # an untrained model has more than 3
    assert scores(tasks, GLOBE, small) == dense
    assert scores(tasks, LM_EVAL, small, "--trust_remote_code") == dense
    found = evaluate(small, EvaluateConfig(max_tokens=512, tasks=(str(tasks / "heldout.yaml"),)), "shipped")
    assert {f"{score.metric},none": score.value for score in found.tasks} == dense
    by_original = scores(tasks, LM_EVAL, MODEL)
    assert {f"{score.metric},none": score.reference for score in found.tasks} == by_original
