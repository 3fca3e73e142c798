"""Before the first fit: what running the model says of its experts, and the budget shared out among the banks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from globe.checkpoint.digest import file_sha256
from globe.checkpoint.report import CalibrationReport
from globe.checkpoint.writer import (
    save_tensors,
)
from globe.errors import UnsupportedModelError
from globe.experts.metric import LayerStatistics
from globe.measure.calibrate import CalibrationText, calibrate, load_statistics, save_statistics
from globe.measure.runnable import find_place
from globe.measure.samples import sample_windows
from globe.measure.sensitivity import Sensitivities, load_sensitivities, save_sensitivities
from globe.model.loading import (
    load,
)
from globe.plan.scopes import Scope, scope_from_json
from globe.run import allocation
from globe.run.coding import CodingPlan, check_reach, measured_sensitivities, plan_coding, plan_from_json, plan_to_json
from globe.run.folder import RunFolder
from globe.run.job import Job
from globe.run.observer import Observer
from globe.run.records import as_json

_STATISTICS, _WINDOWS = "calibration.safetensors", "windows.safetensors"
_SENSITIVITIES = "sensitivities.safetensors"
"""In an unfinished output: what the calibration text said of the layers, its tokens, and what errors cost."""


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
class Preparation:
    """What is known before the first fit."""

    calibration: Calibration
    scopes: tuple[Scope, ...]
    """With the budget shared out."""
    coding: CodingPlan | None
    """How bits are shared out, where experts are coded."""
    uniform_because: str | None
    """Why it was shared out evenly; None where it was allocated."""
    seconds: float
    """Calibration and planning, over all runs that they took."""


def prepare(
    job: Job, watch: Observer, folder: RunFolder | None = None, calibrated: Callable[[], Calibration] | None = None
) -> Preparation:
    """Calibrate, or take what `calibrated` gives, and make the plan, or take up those that are finished in the
    `folder`."""
    if job.config.is_coded:
        check_reach(job)
    calibration = None if folder is None else _load_calibration(folder, watch)
    if calibration is None:
        calibration = run_all(job, watch) if calibrated is None else calibrated()
        if folder is not None:
            _save_calibration(folder, calibration)
    record = None if folder is None else folder.records.read("plan")
    if record is None:
        watch.prepare("planning")
        began = time.monotonic()
        record = {**share_budget(job, calibration), "seconds": time.monotonic() - began}
        if folder is not None:
            job.check_unchanged(folder.records.run["fingerprint"])
            folder.records.write("plan", record)
    record = as_json(record)
    scopes = tuple(scope_from_json(scope) for scope in record["scopes"])
    coding = record["coding"] and plan_from_json(record["coding"])
    return Preparation(calibration, scopes, coding, record["uniform_because"], calibration.seconds + record["seconds"])


def run_all(job: Job, watch: Observer) -> Calibration:
    """All that running the model is to tell."""
    if job.config.calibrate != "none":
        watch.prepare("running the model to calibrate")
    calibration = run_calibration(job)
    if not job.config.is_coded:
        return calibration
    watch.prepare("measuring what errors cost")
    return with_sensitivities(job, calibration)


def run_calibration(job: Job) -> Calibration:
    """Run the model on the calibration text, or on samples of its own, if that is asked for.

    A model that cannot be run is fitted uncalibrated where the samples are no more than the default; the reason is
    kept.
    """
    began, text = time.monotonic(), job.calibration_text
    if job.config.calibrate == "none":
        return Calibration(uncalibrated_because="that is asked for")
    place = find_place(job.checkpoint, job.config.device)
    if text is None and place.device is None:
        return Calibration(uncalibrated_because=place.obstacle)
    model = load(job.checkpoint.fetched(), place.device or job.config.device)
    if text is None:
        try:
            text = CalibrationText("samples", sample_windows(model, job.config.seed))
        except UnsupportedModelError as error:
            return Calibration(uncalibrated_because=str(error), seconds=time.monotonic() - began)
    layers = {index for scope in job.scopes for index in scope.layers}
    statistics = calibrate(model, text.windows, layers, inner=job.config.is_coded and "down" in job.config.families)
    report = CalibrationReport(
        text.name,
        text.fingerprint,
        text.windows.numel(),
        sum(len(of_layer.counts) for of_layer in statistics.values()),
        {str(layer): of_layer.unreached for layer, of_layer in statistics.items() if of_layer.unreached},
        place.obstacle if place.device is not None else None,
    )
    return Calibration(statistics, report, text.windows, seconds=time.monotonic() - began)


def with_sensitivities(job: Job, calibration: Calibration) -> Calibration:
    """What errors in the experts to be coded cost, on the calibration's tokens or on random ones."""
    began, text = time.monotonic(), job.calibration_text
    windows = calibration.windows if text is None else text.windows
    sensitivities, because = measured_sensitivities(job, windows)
    seconds = calibration.seconds + time.monotonic() - began
    return dataclasses.replace(calibration, sensitivities=sensitivities, equal_because=because, seconds=seconds)


def _save_calibration(folder: RunFolder, calibration: Calibration) -> None:
    files: dict[str, str] = {}
    if calibration.statistics is not None and calibration.windows is not None:
        files[_STATISTICS] = save_statistics(folder.file(_STATISTICS), calibration.statistics)
        files[_WINDOWS] = save_tensors(folder.file(_WINDOWS), {"windows": calibration.windows})
    if calibration.sensitivities is not None:
        files[_SENSITIVITIES] = save_sensitivities(folder.file(_SENSITIVITIES), calibration.sensitivities)
    record = {
        "report": calibration.report and dataclasses.asdict(calibration.report),
        "uncalibrated_because": calibration.uncalibrated_because,
        "equal_because": calibration.equal_because,
        "seconds": calibration.seconds,
        "files": files,
    }
    folder.records.write("calibration", record)


def _load_calibration(folder: RunFolder, watch: Observer) -> Calibration | None:
    """The finished calibration of an earlier try; None if there is none, or it was damaged since."""
    record = folder.records.read("calibration")
    if record is None:
        return None
    files = {name: folder.file(name) for name in record["files"]}
    if any(not path.is_file() or file_sha256(path) != record["files"][name] for name, path in files.items()):
        watch.prepare("the finished calibration has been damaged since: calibrating again")
        return None
    return Calibration(
        load_statistics(files[_STATISTICS]) if _STATISTICS in files else None,
        record["report"] and CalibrationReport(**record["report"]),
        load_file(files[_WINDOWS])["windows"] if _WINDOWS in files else None,
        record["uncalibrated_because"],
        load_sensitivities(files[_SENSITIVITIES]) if _SENSITIVITIES in files else None,
        record["equal_because"],
        record["seconds"],
    )


def share_budget(job: Job, calibration: Calibration) -> dict[str, Any]:
    """The scopes with the budget shared out among their banks or rows, and why evenly if so: the record of the plan."""
    text = job.calibration_text
    windows = calibration.windows if text is None else text.windows
    scopes, coding = job.scopes, None
    if calibration.sensitivities is not None:
        because = calibration.equal_because
        coding = plan_to_json(
            plan_coding(job, calibration.statistics, calibration.sensitivities, measured=because is None)
        )
    elif (because := allocation.obstacle(job.checkpoint, job.config, len(job.specs(job.scopes)))) is None:
        scopes = allocation.allocated(job.checkpoint, job.layers, job.scopes, job.config, windows)
    return {
        "scopes": [dataclasses.asdict(scope) for scope in scopes],
        "coding": coding,
        "uniform_because": because,
    }
