"""A loaded model judged on lm-eval's tasks."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Any

from globe.checkpoint.evaluation import TaskScore
from globe.errors import SettingsError
from globe.model.loading import running


class Tasks:
    """Tasks by name, or by the YAML file that describes them, as `lm-eval run --tasks` takes them.

    Raises `SettingsError` where lm-eval is not installed or has no such task.
    """

    def __init__(self, names: Sequence[str]) -> None:
        try:
            settings = importlib.import_module("lm_eval.config.evaluate_config")
        except ImportError as error:
            raise SettingsError(
                f"tasks are those of the package lm-eval, which cannot be imported ({error}): pip install 'lm-eval[hf]'"
            ) from error
        asked = settings.EvaluatorConfig(tasks=[*names])
        try:
            self._manager = asked.process_tasks()
        except ValueError as error:
            raise SettingsError(f"lm-eval: {error}; `lm-eval ls tasks` shows what there is") from error
        self._found = asked.tasks

    def run(self, model: Any, tokenizer: Any, batch: int, beside: Sequence[TaskScore] = ()) -> list[TaskScore]:
        """All scores of a causal language model, those of its reference on the same tasks `beside` them."""
        evaluator = importlib.import_module("lm_eval.evaluator")
        wrapped = importlib.import_module("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch
        )
        with running(model):
            found = evaluator.simple_evaluate(wrapped, tasks=self._found, task_manager=self._manager, log_samples=False)
        theirs = {(each.task, each.metric): each.value for each in beside}
        return [dataclasses.replace(each, reference=theirs.get((each.task, each.metric))) for each in _scores(found)]


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    """What lm-eval found, a metric at a time: `acc,none` is the accuracy that no filter was applied to."""
    scores: list[TaskScore] = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, applied = key.partition(",")
            if not applied or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{applied}")
            scores.append(
                TaskScore(
                    task,
                    metric if applied == "none" else f"{metric}, {applied}",
                    float(value),
                    float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                )
            )
    return scores
