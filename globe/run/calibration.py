"""What running a model said of its experts, and a file to keep it in, for other runs on the same model.

The file is safetensors: the token windows, by layer what `globe.measure.calibrate.save_statistics` writes, and under
`sensitivities.` what errors cost. Its metadata say of which model they are and how they were measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from globe.checkpoint.header import TensorInfo
from globe.checkpoint.report import CalibrationReport
from globe.checkpoint.tensor_files import save_each
from globe.errors import CheckpointError, SettingsError
from globe.experts.metric import LayerStatistics
from globe.measure.calibrate import StoredStatistics, layer_infos, layer_tensors
from globe.measure.runs import wants_sensitivities
from globe.measure.sensitivity import Sensitivities
from globe.run.job import Job
from globe.typed import parsed

_METADATA, _SENSITIVITIES, _WINDOWS = "globe_statistics", "sensitivities.", "windows"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What running the model said of its experts, or the reason why it was not run."""

    statistics: Mapping[int, LayerStatistics] | None = None
    report: CalibrationReport | None = None
    windows: Tensor | None = None
    """The tokens (N, length)."""
    uncalibrated_because: str | None = None
    sensitivities: Sensitivities | None = None
    """Of experts that are to be coded."""
    equal_because: str | None = None
    """Why these are all alike; None where they were measured."""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Of which model statistics are, and how they were measured."""

    fingerprint: str
    report: CalibrationReport


def wants_inner(job: Job) -> bool:
    """Whether second moments of the experts' inner units are needed."""
    return job.config.is_coded and "down" in job.config.families


def keep_statistics(path: Path, job: Job, calibration: Calibration) -> None:
    """Write the statistics of a calibration to a file, a layer at a time; `OutputError` when the disk is full.

    Raises `SettingsError` for a calibration without any.
    """
    statistics, windows, report = calibration.statistics, calibration.windows, calibration.report
    if statistics is None or windows is None or report is None:
        raise SettingsError(f"there are no statistics to be kept in {path}: {calibration.uncalibrated_because}")
    measured = {} if calibration.equal_because else calibration.sensitivities or {}
    infos = [TensorInfo(_WINDOWS, "I64", tuple(windows.shape), path.name, 0, windows.nbytes)]
    infos += layer_infos(path.name, {layer: job.layers[layer] for layer in statistics}, inner=wants_inner(job))
    for (layer, family), each in measured.items():
        name = f"{_SENSITIVITIES}{layer}.{family}"
        infos.append(TensorInfo(name, "F32", tuple(each.shape), path.name, 0, each.nbytes))

    def tensors() -> Iterator[Tensor]:
        yield windows
        for of_layer in statistics.values():
            yield from layer_tensors(of_layer)
        yield from measured.values()

    origin = dataclasses.asdict(_Origin(job.checkpoint.fingerprint(), report))
    save_each(path, infos, tensors(), {_METADATA: json.dumps(origin)})


def kept_statistics(path: Path, job: Job) -> Calibration:
    """The calibration that `keep_statistics` wrote, as far as the job needs it.

    Raises `SettingsError` for a file that is missing, none of these, of another model, or without what is needed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if _METADATA not in metadata:
                raise SettingsError(f"{path} holds no statistics: give a file that --save-statistics wrote")
            origin = parsed(_Origin, json.loads(metadata[_METADATA]), str(path), CheckpointError)
            _check(path, job, origin, names)
            sensitivities: Sensitivities | None = None
            if wants_sensitivities(job.config):
                sensitivities = {
                    (layer, family): file.get_tensor(f"{_SENSITIVITIES}{layer}.{family}")
                    for layer, family in job.compressed()
                }
            windows = file.get_tensor(_WINDOWS)
    except (OSError, SafetensorError) as error:
        raise SettingsError(f"the statistics in {path} cannot be read ({error}): measure them again") from error
    return Calibration(StoredStatistics(path), origin.report, windows, sensitivities=sensitivities)


def _check(path: Path, job: Job, origin: _Origin, names: set[str]) -> None:
    if origin.fingerprint != job.checkpoint.fingerprint():
        raise SettingsError(
            f"the statistics in {path} are of another model than {job.checkpoint.folder}, or of one that has changed "
            "since: measure them again, without --statistics"
        )
    layers = {layer for layer, _ in job.compressed()}
    needed = {f"{layer}.inputs" for layer in layers}
    if wants_inner(job):
        needed |= {f"{layer}.inner" for layer in layers}
    if wants_sensitivities(job.config):
        needed |= {f"{_SENSITIVITIES}{layer}.{family}" for layer, family in job.compressed()}
    if lacking := sorted(needed - names):
        raise SettingsError(
            f"the statistics in {path} were measured for other layers, families or settings, and lack {lacking[0]} and "
            f"{len(lacking) - 1} more: measure them again, without --statistics"
        )
