"""The record of a compression: settings, versions, errors, time and memory; enough to redraw every figure."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from globe.errors import CheckpointError
from globe.train.result import FitResult, StepRecord
from globe.version import __version__

REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class BankReport:
    """How one bank was fitted."""

    layers: list[int]
    families: list[str]
    rank: int
    num_bases: int
    num_matrices: int
    original_parameters: int
    stored_parameters: int
    outcome: str
    """Why the fit stopped."""
    seconds: float
    errors: dict[str, dict[str, float]]
    """Relative Frobenius error as stored, by layer and family."""
    expert_errors: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    """The same of every expert."""
    steps: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """The step records, a list for each field: error, raw_error, activation_lambda, route_beta, temperature, …"""
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Warm-start quality, popularity of the bases, fallbacks, restarts or rejected steps, and `phases`: seconds of
    reading, warm start, fit and storing."""

    @property
    def error(self) -> float:
        """Root mean square of the layers' and families' relative errors: what the fit minimises."""
        return root_mean_square(error for families in self.errors.values() for error in families.values())


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What a compression was calibrated on."""

    text: str
    """`samples` of the model itself, a shipped split or a file."""
    fingerprint: str
    """Of its tokens."""
    num_tokens: int
    num_experts: int
    """Of all layers that were compressed."""
    unreached: dict[str, list[int]]
    """By layer, the experts that no token was routed to; they are weighed as the layer's mean."""
    on_cpu_because: str | None = None
    """Why the model was run there and not on the device of the fits; None where it was not."""

    @property
    def num_unreached(self) -> int:
        return sum(map(len, self.unreached.values()))


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole compression."""

    source: str
    """The model as it was named."""
    fingerprint: str
    """Of the source checkpoint."""
    config: dict[str, Any]
    """The resolved settings."""
    versions: dict[str, str]
    banks: list[BankReport]
    original_bytes: int
    """Of all tensors of the source."""
    compressed_bytes: int
    """Of all tensors of the output."""
    seconds: float = 0.0
    """Spent on calibration, planning and finished scopes, over all runs that it took."""
    peak_memory_bytes: int = 0
    """Largest resident memory of the process."""
    calibration: CalibrationReport | None = None
    """None: fitted to the weights alone."""
    uncalibrated_because: str | None = None
    """Why; None where it was calibrated."""
    uniform_because: str | None = None
    """Why every bank keeps the same share; None where the budget was allocated."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What was left out, or done in another way than the settings say, and why."""

    @property
    def kept(self) -> float:
        """Stored parameters of the compressed families over the original ones."""
        return sum(bank.stored_parameters for bank in self.banks) / sum(bank.original_parameters for bank in self.banks)

    @property
    def error(self) -> float:
        """Root mean square of all layers' and families' relative errors."""
        return root_mean_square(error for _, error in self._errors())

    def family_errors(self) -> dict[str, float]:
        """Root mean square over the layers, by family."""
        by_family: dict[str, list[float]] = {}
        for family, error in self._errors():
            by_family.setdefault(family, []).append(error)
        return {family: root_mean_square(errors) for family, errors in by_family.items()}

    def _errors(self) -> Iterator[tuple[str, float]]:
        for bank in self.banks:
            for families in bank.errors.values():
                yield from families.items()

    def to_json(self) -> dict[str, Any]:
        summary = {"kept": self.kept, "error": self.error, "family_errors": self.family_errors()}
        return {**summary, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> Report:
        """The report of a compressed model; `CheckpointError` if the folder has none."""
        try:
            content = json.loads((folder / REPORT).read_text())
            calibration: dict[str, Any] | None = content.pop("calibration", None)
            fields = _known(cls, content)
            fields["banks"] = [BankReport(**_known(BankReport, bank)) for bank in content["banks"]]
            return cls(**fields, calibration=None if calibration is None else CalibrationReport(**calibration))
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} has no {REPORT}; is it the output of globe compress?") from error
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / REPORT} cannot be read: {error!r}; is it the output of globe compress?"
            ) from error


def _known(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that this version knows; those that have defaults may be missing."""
    return {field.name: content[field.name] for field in dataclasses.fields(kind) if field.name in content}


def root_mean_square(errors: Iterable[float]) -> float:
    squares = [error**2 for error in errors]
    return math.sqrt(sum(squares) / len(squares))


def step_columns(result: FitResult) -> dict[str, list[float]]:
    """The step records as columns, rounded to six significant digits."""
    names = [field.name for field in dataclasses.fields(StepRecord)]
    return {name: [float(f"{getattr(record, name):.6g}") for record in result.steps] for name in names}


def versions() -> dict[str, str]:
    return {
        "globe": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
