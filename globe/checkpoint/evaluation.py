"""The record of what was measured of a finished model: a list in its folder, beside the report of how it was made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from globe.checkpoint.files import read_json
from globe.checkpoint.manifest import write_listed
from globe.errors import CheckpointError
from globe.typed import documented, parsed

EVALUATION = "evaluation.json"


@documented
@dataclasses.dataclass(frozen=True)
class TaskScore:
    """What lm-eval found on one task by one metric."""

    task: str
    metric: str
    """With the filter behind a comma, if one was applied to the answers."""
    value: float
    error: float | None = None
    """Standard error, where lm-eval gives one."""
    reference: float | None = None
    """The same of the reference; None without one that is loaded."""

    @property
    def name(self) -> str:
        """Task and metric."""
        return f"{self.task} ({self.metric})"


@documented
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Quality of a model on one text, and on tasks."""

    perplexity: float
    """exp of the mean negative log likelihood per token."""
    bits_per_byte: float
    """Negative log2 likelihood per byte of UTF-8 text."""
    num_tokens: int
    """Tokens predicted."""
    kl: float | None = None
    """Mean KL(reference ‖ model) per token, in nats; None without a reference."""
    kl_error: float | None = None
    """Standard error of that mean, from the means of the windows; None where there is one window alone."""
    agreement: float | None = None
    """Share of tokens on which both models' most likely next token is the same."""
    text: str | None = None
    """Name of the text."""
    fingerprint: str | None = None
    """SHA-256 of its tokens, window by window."""
    reference: str | None = None
    """What both are told against: `the original`, which was compressed, or another model by its name."""
    reference_fingerprint: str | None = None
    """Of that checkpoint."""
    reference_perplexity: float | None = None
    """That of the reference."""
    tasks: list[TaskScore] = dataclasses.field(default_factory=list[TaskScore])


def read_evaluations(folder: Path) -> list[Evaluation]:
    """What was measured of the model in a folder, the latest last; `CheckpointError` for a record that is none."""
    path = folder / EVALUATION
    return parsed(_Record, read_json(path), str(path), CheckpointError).evaluations if path.exists() else []


def record_evaluation(folder: Path, evaluation: Evaluation) -> list[Evaluation]:
    """Keep an evaluation in the folder, in place of an earlier one on the same text against the same reference; of that
    the tasks stay that were not run again.

    Returns all that are kept. `OutputError` if the folder cannot be written.
    """
    identity = (evaluation.fingerprint, evaluation.reference_fingerprint)
    others, run = list[Evaluation](), {(each.task, each.metric) for each in evaluation.tasks}
    for other in read_evaluations(folder):
        if (other.fingerprint, other.reference_fingerprint) not in (identity, (evaluation.fingerprint, None)):
            others.append(other)
        else:
            left = [each for each in other.tasks if (each.task, each.metric) not in run]
            evaluation = dataclasses.replace(evaluation, tasks=[*left, *evaluation.tasks])
    kept = [*others, evaluation]
    content = json.dumps({"evaluations": [dataclasses.asdict(each) for each in kept]}, indent=2, allow_nan=False)
    write_listed(folder, EVALUATION, f"{content}\n".encode())
    return kept


def of_original(evaluations: list[Evaluation]) -> Evaluation | None:
    """The latest that tells how far the model is from the one that was compressed."""
    return next((each for each in reversed(evaluations) if each.reference == "the original"), None)


@dataclasses.dataclass(frozen=True)
class _Record:
    evaluations: list[Evaluation]
