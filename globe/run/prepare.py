"""Before the first fit: what running the model says of its experts, and the budget shared out among the banks."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import ChainMap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from globe.checkpoint.digest import file_sha256
from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.report import CalibrationReport
from globe.checkpoint.tensor_files import save_tensors
from globe.errors import GlobeError, UnsupportedModelError
from globe.experts.metric import LayerStatistics
from globe.machine.ring import Ring
from globe.measure.calibrate import (
    CalibrationText,
    StoredStatistics,
    calibrate,
    read_calibration_text,
    save_statistics,
)
from globe.measure.placed import every
from globe.measure.runnable import Place, find_place, has_room
from globe.measure.runs import MOST_WINDOWS, wants_sensitivities
from globe.measure.samples import NUM_SAMPLES, sample_windows
from globe.measure.sensitivity import Sensitivities, load_sensitivities, save_sensitivities
from globe.measure.settings import EvaluateConfig
from globe.measure.streamed import KeptStates, calibrate_streamed, sensitivities_streamed
from globe.model.loading import load
from globe.model.streamed import StreamedModel
from globe.plan.scopes import Scope, scope_from_json
from globe.run import allocation
from globe.run.calibration import Calibration, keep_statistics, kept_statistics, wants_inner
from globe.run.coding import CodingPlan, measured_sensitivities, plan_coding, plan_from_json, plan_to_json
from globe.run.folder import RunFolder
from globe.run.job import Job
from globe.run.observer import Observer
from globe.run.outline import check_reach
from globe.run.ranks import ALONE, Ranks
from globe.run.records import as_json
from globe.run.rounding import RoundingPlan, check_packable, plan_rounding

_STATISTICS, _WINDOWS = "calibration.safetensors", "windows.safetensors"
_SENSITIVITIES = "sensitivities.safetensors"
"""In an unfinished output: what the calibration text said of the layers, its tokens, and what errors cost."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is known before the first fit."""

    calibration: Calibration
    scopes: tuple[Scope, ...]
    """With the budget shared out."""
    coding: CodingPlan | RoundingPlan | None
    """How bits are shared out, where experts are coded."""
    uniform_because: str | None
    """Why it was shared out evenly; None where it was allocated."""
    seconds: float
    """Calibration and planning, over all runs that they took."""


def prepare(
    job: Job,
    watch: Observer,
    folder: RunFolder | None = None,
    calibrated: Callable[[], Calibration] | None = None,
    ranks: Ranks = ALONE,
) -> Preparation:
    """Calibrate, or take what `calibrated` gives, and make the plan, or take up those that are finished in the
    `folder`."""
    if job.config.is_packed:
        check_packable(job)
    elif job.config.is_coded:
        check_reach(job)
    calibration = calibration_of(job, watch, folder, calibrated, ranks)
    record = None if folder is None else folder.records.read("plan")
    if record is None:
        watch.prepare("planning")
        began = time.monotonic()
        record = {**share_budget(job, calibration, folder, ranks), "seconds": time.monotonic() - began}
        if folder is not None:
            job.check_unchanged(folder.records.run["fingerprint"])
            folder.records.write("plan", record)
    record = as_json(record)
    scopes = tuple(scope_from_json(scope) for scope in record["scopes"])
    coding = record["coding"]
    if coding is not None:
        kept = folder and folder.records.folder
        coding = RoundingPlan.from_json(coding) if job.config.is_packed else plan_from_json(coding, kept)
    return Preparation(calibration, scopes, coding, record["uniform_because"], calibration.seconds + record["seconds"])


def calibration_of(
    job: Job,
    watch: Observer,
    folder: RunFolder | None = None,
    calibrated: Callable[[], Calibration] | None = None,
    ranks: Ranks = ALONE,
) -> Calibration:
    """Run the model, or take what `calibrated` gives, or take up what is finished in the `folder`; it is kept there."""
    calibration = None if folder is None else _load_calibration(folder, watch)
    if calibration is None:
        calibration = run_all(job, watch, folder, ranks) if calibrated is None else calibrated()
        if folder is not None:
            calibration = _save_calibration(job, folder, calibration)
    return calibration


def run_all(job: Job, watch: Observer, folder: RunFolder | None = None, ranks: Ranks = ALONE) -> Calibration:
    """All that running the model is to tell, or a file of what it told. Without a folder it is for one process."""
    kept = job.config.statistics
    calibration = run_calibration(job, watch, folder, ranks) if kept is None else kept_statistics(Path(kept), job)
    if not job.config.is_coded or calibration.sensitivities is not None:
        return calibration
    watch.prepare("measuring what errors cost")
    return with_sensitivities(job, calibration, folder, ranks)


def run_calibration(job: Job, watch: Observer, folder: RunFolder | None = None, ranks: Ranks = ALONE) -> Calibration:
    """Run the model on the calibration text, or on samples of its own, if that is asked for.

    A model that does not fit into memory is run a layer at a time, on the split that ships with GloBE in place of
    samples, and what errors cost is measured with it. One that cannot be run at all is fitted uncalibrated where the
    samples are no more than the default; the reason is kept.
    """
    began, text = time.monotonic(), job.calibration_text
    if job.config.calibrate == "none":
        return Calibration(uncalibrated_because="that is asked for")
    place = find_place(job.checkpoint, job.config.device)
    if place.is_streamed:
        return _run_streamed(job, place, watch, folder, ranks)
    if text is None and place.device is None:
        return Calibration(uncalibrated_because=place.obstacle)
    watch.prepare("running the model to calibrate")
    model = load(job.checkpoint.fetched(), place.device or job.config.device)
    if text is None:
        try:
            text = CalibrationText("samples", sample_windows(model, job.config.seed))
        except UnsupportedModelError as error:
            return Calibration(uncalibrated_because=str(error), seconds=time.monotonic() - began)
    statistics = calibrate(model, text.windows, _sizes(job), inner=wants_inner(job))
    report = _report(text, statistics)
    if place.device is not None:
        report = dataclasses.replace(report, on_cpu_because=place.obstacle)
    return Calibration(statistics, report, text.windows, seconds=time.monotonic() - began)


def _run_streamed(job: Job, place: Place, watch: Observer, folder: RunFolder | None, ranks: Ranks) -> Calibration:
    assert place.device is not None
    began, text, sizes = time.monotonic(), job.calibration_text, _sizes(job)
    if text is None:
        try:
            most = min(job.config.calibration_tokens, NUM_SAMPLES * EvaluateConfig.length)
            text = read_calibration_text(job.checkpoint.folder, "calibration", most, job.config.trust_remote_code)
        except GlobeError as error:
            because = f"{place.obstacle}; run a layer at a time it would be on a text, but {error}"
            return Calibration(uncalibrated_because=because)
    watch.prepare("running the model to calibrate, a layer at a time")
    if folder is None or not has_room(job.checkpoint, place, ranks.num_here):
        ranks = ALONE
    parts = ranks.together(_measure_layers, job, place.device, text.windows, folder, watch=watch)
    statistics, sensitivities = parts[0].statistics, None
    if folder is not None and len(parts) > 1:
        found = ((layer, parts[layer % len(parts)].statistics[layer]) for layer in sizes)
        save_statistics(folder.file(_STATISTICS), sizes, found, inner=wants_inner(job))
        statistics = StoredStatistics(folder.file(_STATISTICS))
        for rank in range(len(parts)):
            folder.file(_part_name(rank)).unlink()
    if wants_sensitivities(job.config):
        by_family = ChainMap(*(part.sensitivities for part in parts))
        sensitivities = {key: by_family[key] for key in job.compressed()}
    report = dataclasses.replace(_report(text, statistics), streamed_because=place.obstacle)
    return Calibration(statistics, report, text.windows, sensitivities=sensitivities, seconds=time.monotonic() - began)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What one process of a ring finds: of the layers that it runs."""

    statistics: Mapping[int, LayerStatistics]
    sensitivities: Sensitivities


def _measure_layers(
    job: Job, device: str, windows: Tensor, folder: RunFolder | None, ring: Ring, watch: Observer
) -> _Measured:
    model, layers, wanted = StreamedModel(job.checkpoint, device), _sizes(job), wants_sensitivities(job.config)
    with contextlib.closing(KeptStates(folder and folder.path, every(windows, MOST_WINDOWS))) as kept:
        found = calibrate_streamed(model, windows, layers, kept if wanted else None, inner=wants_inner(job), ring=ring)
        if folder is None:
            statistics = dict(found)
        else:
            path = folder.file(_STATISTICS if ring.size == 1 else _part_name(ring.rank))
            own = {layer: layers[layer] for layer in ring.turns(max(layers) + 1) if layer in layers}
            save_statistics(path, own, found, inner=wants_inner(job))
            statistics = StoredStatistics(path)
        if not wanted:
            return _Measured(statistics, {})
        if ring.rank == 0:
            watch.prepare("measuring what errors cost, a layer at a time")
        return _Measured(statistics, sensitivities_streamed(model, windows, layers, kept, job.config.seed, ring=ring))


def _part_name(rank: int) -> str:
    """Of the file with the statistics of the layers that one process of several runs."""
    return f"calibration-{rank}.safetensors"


def _sizes(job: Job) -> dict[int, ExpertLayer]:
    """The layers that are compressed, in order."""
    return {index: job.layers[index] for index in sorted(index for scope in job.scopes for index in scope.layers)}


def _report(text: CalibrationText, statistics: Mapping[int, LayerStatistics]) -> CalibrationReport:
    unreached = {layer: of_layer.unreached for layer, of_layer in statistics.items()}
    return CalibrationReport(
        text.name,
        text.fingerprint,
        text.windows.numel(),
        sum(len(of_layer.counts) for of_layer in statistics.values()),
        {str(layer): experts for layer, experts in unreached.items() if experts},
    )


def with_sensitivities(
    job: Job, calibration: Calibration, folder: RunFolder | None = None, ranks: Ranks = ALONE
) -> Calibration:
    """What errors in the experts to be coded cost, on the calibration's tokens or on random ones."""
    began, text = time.monotonic(), job.calibration_text
    windows = calibration.windows if text is None else text.windows
    sensitivities, because = measured_sensitivities(job, windows, folder and folder.path, ranks)
    seconds = calibration.seconds + time.monotonic() - began
    return dataclasses.replace(calibration, sensitivities=sensitivities, equal_because=because, seconds=seconds)


def _save_calibration(job: Job, folder: RunFolder, calibration: Calibration) -> Calibration:
    """Record it; what it holds of the layers lies on the disk from then on."""
    files: dict[str, str] = {}
    path, statistics, windows = folder.file(_STATISTICS), calibration.statistics, calibration.windows
    if statistics is not None and windows is not None:
        if isinstance(statistics, StoredStatistics) and statistics.path == path:
            files[_STATISTICS] = file_sha256(path)
        else:
            sizes = _sizes(job)
            found = ((layer, statistics[layer]) for layer in sizes)
            files[_STATISTICS] = save_statistics(path, sizes, found, inner=wants_inner(job))
            calibration = dataclasses.replace(calibration, statistics=StoredStatistics(path))
        files[_WINDOWS] = save_tensors(folder.file(_WINDOWS), {"windows": windows})
    if calibration.sensitivities is not None:
        files[_SENSITIVITIES] = save_sensitivities(folder.file(_SENSITIVITIES), calibration.sensitivities)
    record = {
        "report": calibration.report and dataclasses.asdict(calibration.report),
        "uncalibrated_because": calibration.uncalibrated_because,
        "equal_because": calibration.equal_because,
        "seconds": calibration.seconds,
        "files": files,
    }
    if job.config.save_statistics is not None:
        keep_statistics(Path(job.config.save_statistics), job, calibration)
    folder.records.write("calibration", record)
    return calibration


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
        StoredStatistics(files[_STATISTICS]) if _STATISTICS in files else None,
        record["report"] and CalibrationReport(**record["report"]),
        load_file(files[_WINDOWS])["windows"] if _WINDOWS in files else None,
        record["uncalibrated_because"],
        load_sensitivities(files[_SENSITIVITIES]) if _SENSITIVITIES in files else None,
        record["equal_because"],
        record["seconds"],
    )


def share_budget(
    job: Job, calibration: Calibration, folder: RunFolder | None = None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """The scopes with the budget shared out among their banks or rows, and why evenly if so: the record of the plan."""
    text = job.calibration_text
    windows = calibration.windows if text is None else text.windows
    scopes, coding = job.scopes, None
    if calibration.sensitivities is not None:
        because = calibration.equal_because
        known, measured = (calibration.statistics, calibration.sensitivities), because is None
        if job.config.is_packed:
            coding = dataclasses.asdict(plan_rounding(job, *known, measured))
        else:
            coding = plan_to_json(plan_coding(job, *known, measured, ranks, folder and folder.records.folder))
    elif (because := allocation.obstacle(job.checkpoint, job.config, len(job.specs(job.scopes)))) is None:
        scopes = allocation.allocated(
            job.checkpoint, job.layers, job.scopes, job.config, windows, folder and folder.path, ranks
        )
    return {
        "scopes": [dataclasses.asdict(scope) for scope in scopes],
        "coding": coding,
        "uniform_because": because,
    }
