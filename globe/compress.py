"""From a checkpoint to a compressed one, a scope at a time: read its experts, fit, write its factors, forget it.

Calibration, plan and scopes are phases. A phase is finished when its record is on disk, after its files and with their
SHA-256; a killed run goes on after what is finished, and only the whole output gets its name.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from globe import allocate
from globe.calibrate import CalibrationText, calibrate, load_statistics, read_calibration_text, save_statistics
from globe.checkpoint.digest import file_sha256
from globe.checkpoint.header import TORCH_DTYPES
from globe.checkpoint.layout import ExpertLayer, Family, dtype_notes, source_names
from globe.checkpoint.manifest import MANIFEST
from globe.checkpoint.reader import CONFIG, INDEX, Checkpoint, open_checkpoint
from globe.checkpoint.stacks import read_family
from globe.checkpoint.writer import (
    copy_side_files,
    copy_tensors,
    require_space,
    save_tensors,
    write_index,
    write_json,
)
from globe.config import CompressConfig
from globe.empty_model import check_same_experts
from globe.errors import CheckpointError, UnsupportedModelError, UntrustedCodeError
from globe.experts import StoredFactors, read_stack, to_storage
from globe.loading import check_language_model, check_weights, empty_model, expert_layers, in_json, load, open_source
from globe.memory import FITS_EXHAUSTED, explained_exhaustion
from globe.metric import LayerStatistics
from globe.model.autoload import AUTO_MAP, AUTOLOAD, write_autoload
from globe.model.bank_spec import BankSpec, encoding_of
from globe.model.expert_modules import factor_names, find_experts
from globe.model.factor_check import RUN_METADATA
from globe.model.names import FactorNames, dense_halves, tripwire_tensor
from globe.model.quantization_config import GlobeQuantizationConfig
from globe.phases import PhaseClock
from globe.plan import BankPlan, Scope, make_plan, scope_from_json
from globe.progress import Observer, Observers, describe
from globe.records import as_json
from globe.report import REPORT, BankReport, CalibrationReport, Report, peak_memory, step_columns, versions
from globe.run_folder import RunFolder, open_run
from globe.runnable import find_place
from globe.samples import sample_windows
from globe.shipped import resolve_model
from globe.source_layout import SOURCE_LAYOUT, write_source_layout
from globe.streamed import StreamedExperts, is_intact
from globe.train.fit_banks import fit_bank
from globe.train.result import FitResult, StepRecord

_STATISTICS, _WINDOWS = "calibration.safetensors", "windows.safetensors"
"""In an unfinished output: what the calibration text said of the layers, and its tokens."""


def compress(
    model: str | Path,
    output: str | Path,
    config: CompressConfig = CompressConfig(),  # noqa: B008
    observers: Iterable[Observer] = (),
    *,
    overwrite: bool = False,
) -> Report:
    """Compress the routed experts of `model` (a local folder, a Hub id, or "shipped") into the folder `output`.

    The output is a Hugging Face checkpoint that `AutoModelForCausalLM` loads after `import globe`. Memory follows the
    largest scope, and the model itself where that is run: to calibrate and to plan, if it takes less than half of the
    machine's. A run on the output of a killed one goes on after what that finished; what was damaged since is done
    again. With `overwrite`, an output that GloBE wrote earlier is replaced when the new one is whole, and an unfinished
    run with other settings is started anew.

    Raises, all of them `GlobeError`: `SettingsError` for settings that do not fit the model or differ from those of the
    run to go on with; `CheckpointError` for damaged files, weights that are not finite, and a source that changes
    while it is read; `UnsupportedModelError` for what is no mixture of experts that GloBE knows; `OutputError` if the
    output exists, another process writes it, or the disk is full.
    """
    watch = Observers(observers)
    try:
        job = make_job(model, config)
        for note in job.notes:
            watch.note(note)
        watch.prepare("reading the source")
        run = job.run()
        source = job.checkpoint.folder if job.checkpoint.repo is None else None
        with open_run(Path(output), run, overwrite=overwrite, source=source) as folder:
            if not folder.whole():
                _work(job, folder, watch)
            folder.publish()
        return Report.read(folder.output)
    finally:
        watch.stop()


def _work(job: Job, folder: RunFolder, watch: Observer) -> None:
    """All phases that are not finished yet."""
    written = sum(path.stat().st_size for path in folder.path.glob("model-*.safetensors"))
    require_space(folder.path, job.predicted_bytes(job.scopes) - written)
    preparation = prepare(job, watch, folder)
    scopes = preparation.scopes
    left = [number for number in range(len(scopes)) if not _is_finished(folder, number, watch)]
    finished = [number for number in range(len(scopes)) if number not in left]
    watch.start([scopes[number] for number in (*finished, *left)], len(finished))
    for number in left:
        with explained_exhaustion(f"fitting scope {number + 1} on {job.config.device}", FITS_EXHAUSTED):
            fit_scope(job, preparation, folder, number, watch)
        watch.scope(scopes[number])
    assemble(job, preparation, folder)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a compression does, decided before any work."""

    source: str
    """The model as it was named."""
    checkpoint: Checkpoint
    config: CompressConfig
    """Resolved."""
    layers: Mapping[int, ExpertLayer]
    """By number, those that hold experts."""
    names: FactorNames
    scopes: tuple[Scope, ...]
    """Every bank with the same share of the budget."""
    calibration_text: CalibrationText | None
    """Where one is given; the model's own samples are not known yet."""
    notes: tuple[str, ...]
    """What is done otherwise than one might expect."""

    def run(self) -> dict[str, Any]:
        """What the run is made of: only the same run goes on in an unfinished output."""
        return {
            "command": "compress",
            "source": self.source,
            "fingerprint": self.checkpoint.fingerprint(),
            "globe_version": versions()["globe"],
            "config": dataclasses.asdict(self.config),
            "calibration": None if self.calibration_text is None else self.calibration_text.fingerprint,
        }

    def dtype(self, layer: int) -> torch.dtype:
        """What a layer's factors in floating point are stored in."""
        if self.config.factor_dtype in ("float32", "bfloat16", "float16"):
            return getattr(torch, self.config.factor_dtype)
        return TORCH_DTYPES[self.layers[layer].dtype]

    def predicted_bytes(self, scopes: Sequence[Scope]) -> int:
        """Of the output's tensors, with banks as in `scopes`."""
        kept = sum(self.checkpoint.tensors[name].nbytes for names in self.kept().values() for name in names)
        factors = sum(
            bank.stored_bytes(self.config.precision, self.dtype(bank.layers[0]).itemsize)
            for scope in scopes
            for bank in scope.banks
        )
        halves = sum(
            layer.num_experts * layer.intermediate_size * layer.hidden_size * TORCH_DTYPES[layer.dtype].itemsize
            for scope in scopes
            for layer in (self.layers[index] for index in scope.layers)
            for _ in dense_halves(self.config.families)
        )
        return kept + factors + halves

    def original_bytes(self) -> int:
        """Of the source's tensors."""
        return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())

    def kept(self) -> dict[str, list[str]]:
        """The tensors that stay as they are, by shard; shards that keep none are left out."""
        replaced = {name for scope in self.scopes for index in scope.layers for name in self._sources(index)}
        kept = {
            shard: [t.name for t in self.checkpoint.shard_tensors(shard) if t.name not in replaced]
            for shard in self.checkpoint.shards
        }
        return {shard: names for shard, names in kept.items() if names}

    def factor_files(self, number: int) -> list[str]:
        """The output's files with the factors of a scope: one, or one for each layer where layers are streamed."""
        counts = [len(scope.layers) if self.config.stream else 1 for scope in self.scopes]
        first, total = sum(counts[:number]), sum(counts) + len(self.kept())
        return [_file(first + piece, total) for piece in range(counts[number])]

    def kept_files(self) -> dict[str, str]:
        """The output's files with the tensors that stay, by the shard that they come from."""
        before, kept = sum(len(self.factor_files(number)) for number in range(len(self.scopes))), self.kept()
        return {shard: _file(before + offset, before + len(kept)) for offset, shard in enumerate(kept)}

    def spec(self, bank: BankPlan) -> BankSpec:
        return BankSpec(bank.layers, bank.families, bank.rank, bank.num_bases, encoding_of(self.config.precision))

    def specs(self, scopes: Sequence[Scope]) -> list[BankSpec]:
        return [self.spec(bank) for scope in scopes for bank in scope.banks]

    def _sources(self, index: int) -> list[str]:
        """The layer's source tensors that the output replaces: of its families in banks and of the dense halves."""
        families: set[Family] = {*self.config.families, *dense_halves(self.config.families)}
        return [name for family in families for name in source_names(self.layers[index], family)]


def make_job(model: str | Path, config: CompressConfig) -> Job:
    """Open the source and check that settings, files and transformers' model of it fit each other; raises otherwise as
    `compress` does."""
    checkpoint, config = open_source(resolve_model(model)), config.resolved()
    layers = {layer.index: layer for layer in expert_layers(checkpoint)}
    scopes = make_plan(list(layers.values()), config)
    empty = empty_model(checkpoint)
    check_same_experts(layers, find_experts(empty))
    check_weights(checkpoint, empty)
    num_banks = sum(len(scope.banks) for scope in scopes)
    if config.calibrate != "none" or allocate.obstacle(checkpoint, config, num_banks) is None:
        check_language_model(checkpoint, empty)
    notes, text = [*checkpoint.notes, *dtype_notes(layers.values()), *checkpoint.side_files().left_out], None
    if (name := config.calibrate) not in ("samples", "none"):
        try:
            text = read_calibration_text(checkpoint.folder, name, config.calibration_tokens, config.trust_remote_code)
        except UntrustedCodeError as error:
            notes.append(f"calibrated on samples of the model itself, not on {name}: {error}")
    source = str(model).encode(errors="backslashreplace").decode()  # a path that is not UTF-8
    return Job(source, checkpoint, config, layers, factor_names(empty), tuple(scopes), text, tuple(notes))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What running the model said of its experts, or the reason why it was not run."""

    statistics: Mapping[int, LayerStatistics] | None = None
    report: CalibrationReport | None = None
    windows: Tensor | None = None
    """The tokens (N, length)."""
    uncalibrated_because: str | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is known before the first fit."""

    calibration: Calibration
    scopes: tuple[Scope, ...]
    """With the budget shared out."""
    uniform_because: str | None
    """Why it was shared out evenly; None where it was allocated."""
    seconds: float
    """Calibration and planning, over all runs that they took."""


def prepare(job: Job, watch: Observer, folder: RunFolder | None = None) -> Preparation:
    """Calibrate and make the plan, or take up those that are finished in the `folder`."""
    calibration = None if folder is None else _load_calibration(folder, watch)
    if calibration is None:
        if job.config.calibrate != "none":
            watch.prepare("running the model to calibrate")
        calibration = run_calibration(job)
        if folder is not None:
            _save_calibration(folder, calibration)
    record = None if folder is None else folder.records.read("plan")
    if record is None:
        watch.prepare("planning")
        began = time.monotonic()
        scopes, because = share_budget(job, calibration)
        record = {
            "scopes": [dataclasses.asdict(scope) for scope in scopes],
            "uniform_because": because,
            "seconds": time.monotonic() - began,
        }
        if folder is not None:
            _check_source(job, folder)
            folder.records.write("plan", record)
    scopes = tuple(scope_from_json(scope) for scope in as_json(record["scopes"]))
    return Preparation(calibration, scopes, record["uniform_because"], calibration.seconds + record["seconds"])


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
    statistics = calibrate(model, text.windows, {index for scope in job.scopes for index in scope.layers})
    report = CalibrationReport(
        text.name,
        text.fingerprint,
        text.windows.numel(),
        sum(len(found.counts) for found in statistics.values()),
        {str(layer): found.unreached for layer, found in statistics.items() if found.unreached},
        place.obstacle if place.device is not None else None,
    )
    return Calibration(statistics, report, text.windows, None, time.monotonic() - began)


def _save_calibration(folder: RunFolder, calibration: Calibration) -> None:
    files: dict[str, str] = {}
    if calibration.statistics is not None and calibration.windows is not None:
        files[_STATISTICS] = save_statistics(folder.file(_STATISTICS), calibration.statistics)
        files[_WINDOWS] = save_tensors(folder.file(_WINDOWS), {"windows": calibration.windows})
    record = {
        "report": calibration.report and dataclasses.asdict(calibration.report),
        "uncalibrated_because": calibration.uncalibrated_because,
        "seconds": calibration.seconds,
        "files": files,
    }
    folder.records.write("calibration", record)


def _load_calibration(folder: RunFolder, watch: Observer) -> Calibration | None:
    """The finished calibration of an earlier try; None if there is none, or it was damaged since."""
    record = folder.records.read("calibration")
    if record is None:
        return None
    if not record["files"]:
        return Calibration(uncalibrated_because=record["uncalibrated_because"], seconds=record["seconds"])
    if any(
        not folder.file(name).is_file() or file_sha256(folder.file(name)) != sha
        for name, sha in record["files"].items()
    ):
        watch.prepare("the finished calibration has been damaged since: calibrating again")
        return None
    return Calibration(
        load_statistics(folder.file(_STATISTICS)),
        CalibrationReport(**record["report"]),
        load_file(folder.file(_WINDOWS))["windows"],
        None,
        record["seconds"],
    )


def share_budget(job: Job, calibration: Calibration) -> tuple[Sequence[Scope], str | None]:
    """The scopes with the budget shared out among the banks, or as they are and the reason for that."""
    because = allocate.obstacle(job.checkpoint, job.config, len(job.specs(job.scopes)))
    if because is not None:
        return job.scopes, because
    text = job.calibration_text
    windows = calibration.windows if text is None else text.windows
    return allocate.allocated(job.checkpoint, job.layers, job.scopes, job.config, windows), None


def _check_source(job: Job, folder: RunFolder) -> None:
    """Raise `CheckpointError` if the source is not what it was when the run began."""
    if job.checkpoint.fingerprint() != folder.records.run["fingerprint"]:
        raise CheckpointError(
            f"{job.checkpoint.folder} changed while it was read: what was finished before is kept; put the files back "
            "and run the same command again, or give --overwrite to start anew"
        )


def _is_finished(folder: RunFolder, number: int, watch: Observer) -> bool:
    """Whether a scope's record is there and its files are as they were written."""
    record = folder.records.read(_scope_record(number))
    if record is None:
        return False
    if folder.holds({file: content["sha256"] for file, content in record["files"].items()}):
        return True
    folder.records.remove(_scope_record(number))
    watch.prepare(f"finished scope {number} has been damaged since: fitting it again")
    return False


def fit_scope(job: Job, preparation: Preparation, folder: RunFolder, number: int, watch: Observer) -> None:
    """Fit the banks of one scope and write their factors, then their record."""
    scope, reports, files = preparation.scopes[number], list[BankReport](), dict[str, dict[str, Any]]()
    fit = _stream if job.config.stream else _fit
    run = fit(job, preparation, folder, number, watch, reports)
    for piece, (file, tensors) in enumerate(zip(job.factor_files(number), run, strict=True)):
        for index in scope.layers[piece : piece + 1] if job.config.stream else scope.layers:
            for family in dense_halves(job.config.families):
                tensors[job.names.dense(index, family)] = read_family(job.checkpoint, job.layers[index], family)
        if number == piece == 0:
            tensors[job.names.tripwire(job.specs(job.scopes))] = tripwire_tensor(job.dtype(scope.layers[0]))
        sha256 = save_tensors(folder.path / file, tensors, {RUN_METADATA: folder.records.identity})
        files[file] = {"sha256": sha256, "tensors": {name: tensor.nbytes for name, tensor in tensors.items()}}
    _check_source(job, folder)
    record = {"banks": [dataclasses.asdict(report) for report in reports], "files": files}
    folder.records.write(_scope_record(number), record)
    for path in folder.records.folder.glob("state-*.safetensors"):
        path.unlink()


def assemble(job: Job, preparation: Preparation, folder: RunFolder) -> None:
    """Add everything that is not a factor, check that the whole opens, and record it."""
    weight_map: dict[str, str] = {}
    compressed_bytes = 0
    banks: list[BankReport] = []
    files: dict[str, str] = {}
    for number in range(len(preparation.scopes)):
        record = folder.records.read(_scope_record(number))
        assert record is not None
        banks += [BankReport(**bank) for bank in record["banks"]]
        for file, content in record["files"].items():
            files[file] = content["sha256"]
            weight_map |= dict.fromkeys(content["tensors"], file)
            compressed_bytes += sum(content["tensors"].values())
    kept = job.kept()
    for shard, file in job.kept_files().items():
        files[file] = copy_tensors(job.checkpoint, shard, kept[shard], folder.path / file)
        weight_map |= dict.fromkeys(kept[shard], file)
        compressed_bytes += sum(job.checkpoint.tensors[name].nbytes for name in kept[shard])
    calibration = preparation.calibration
    report = Report(
        job.source,
        folder.records.run["fingerprint"],
        as_json(dataclasses.asdict(job.config)),
        versions(),
        banks,
        job.original_bytes(),
        compressed_bytes,
        preparation.seconds + sum(bank.seconds for bank in banks),
        peak_memory(),
        calibration.report,
        calibration.uncalibrated_because,
        preparation.uniform_because,
        list(job.notes),
    )
    files |= copy_side_files(job.checkpoint, folder.path, leave_out=(MANIFEST,))
    files[SOURCE_LAYOUT] = write_source_layout(folder.path, job.checkpoint)
    files[INDEX] = write_index(folder.path, weight_map, compressed_bytes)
    files[REPORT] = write_json(folder.path / REPORT, report.to_json())
    section = GlobeQuantizationConfig(
        job.specs(preparation.scopes),
        job.config.activation,
        globe_version=versions()["globe"],
        run=folder.records.identity,
    ).to_dict()
    files[AUTOLOAD] = write_autoload(folder.path)
    config = {**in_json(job.checkpoint.config), "auto_map": AUTO_MAP, "quantization_config": section}
    files[CONFIG] = write_json(folder.path / CONFIG, config)
    open_checkpoint(folder.path)
    _check_source(job, folder)
    folder.complete(files)


def _fit(
    job: Job, preparation: Preparation, folder: RunFolder, number: int, watch: Observer, reports: list[BankReport]
) -> Iterator[dict[str, Tensor]]:
    """All tensors of a scope's banks at once; the banks' reports are added to `reports`."""
    del folder
    tensors: dict[str, Tensor] = {}
    for bank in preparation.scopes[number].banks:
        phases = PhaseClock()
        stack = read_stack(job.checkpoint, job.layers, bank, preparation.calibration.statistics)
        config = job.config.fit_config(bank.rank, bank.num_bases)
        phases.end("reading")
        result = fit_bank(stack.weights, config, _watch_steps(bank, watch, phases, 0), metric=stack.metric)
        phases.end("fit")
        stored = to_storage(stack, result.factors, job.dtype(bank.layers[0]), job.config.precision)
        phases.end("storing")
        tensors |= {job.names.bases(job.spec(bank)): stored.bases, **_named(job, stored)}
        reports.append(_report(bank, result, [stored], phases, watch))
    yield tensors


def _stream(
    job: Job, preparation: Preparation, folder: RunFolder, number: int, watch: Observer, reports: list[BankReport]
) -> Iterator[dict[str, Tensor]]:
    """The same, a layer at a time, no more than one of them in memory; the bases come with the first."""
    scope, precision = preparation.scopes[number], job.config.precision
    statistics = preparation.calibration.statistics
    streams = [StreamedExperts(job.checkpoint, job.layers, bank, statistics) for bank in scope.banks]
    results, clocks = list[FitResult](), list[PhaseClock]()
    for place, (bank, stream) in enumerate(zip(scope.banks, streams, strict=True)):
        clocks.append(PhaseClock())
        config, state = (
            job.config.fit_config(bank.rank, bank.num_bases),
            folder.file(f"state-{number}-{place}.safetensors"),
        )
        if state.exists() and not is_intact(state):
            watch.prepare(
                f"the saved state of the fit of {describe(bank)} has been damaged since: fitting it from the start"
            )
            state.unlink()
        results.append(stream.fit(config, _watch_steps(bank, watch, clocks[-1], 1), state))
        clocks[-1].end("fit")
    stores = [
        stream.store(result.factors, job.dtype(scope.layers[0]), precision)
        for stream, result in zip(streams, results, strict=True)
    ]
    kept: list[list[StoredFactors]] = [[] for _ in streams]
    for layer in zip(*stores, strict=True):
        tensors: dict[str, Tensor] = {}
        for bank, stored, errors in zip(scope.banks, layer, kept, strict=True):
            tensors |= _named(job, stored)
            if not errors:
                tensors[job.names.bases(job.spec(bank))] = stored.bases
            errors.append(dataclasses.replace(stored, adapters={}, codes={}, bases=stored.bases.new_empty(0)))
        yield tensors
    for bank, result, stored, phases in zip(scope.banks, results, kept, clocks, strict=True):
        reports.append(_report(bank, result, stored, phases, watch))


def _named(job: Job, stored: StoredFactors) -> dict[str, Tensor]:
    """Adapters and codes by their names in the output."""
    adapters = {job.names.adapters(*key): tensor for key, tensor in stored.adapters.items()}
    return adapters | {job.names.codes(*key): tensor for key, tensor in stored.codes.items()}


def _report(
    bank: BankPlan, result: FitResult, stored: Sequence[StoredFactors], phases: PhaseClock, watch: Observer
) -> BankReport:
    errors: dict[str, dict[str, float]] = {}
    expert_errors: dict[str, dict[str, list[float]]] = {}
    for part in stored:
        for layer, family in part.errors:
            errors.setdefault(str(layer), {})[family] = part.errors[layer, family]
            expert_errors.setdefault(str(layer), {})[family] = part.expert_errors[layer, family]
    metrics = {name: value for name, value in result.metrics.items() if name != "trajectory"}  # is in the steps
    report = BankReport(
        list(bank.layers),
        list(bank.families),
        bank.rank,
        bank.num_bases,
        bank.num_matrices,
        bank.original_parameters,
        bank.stored_parameters,
        result.outcome,
        sum(phases.seconds.values()),
        errors,
        expert_errors,
        step_columns(result),
        {**metrics, "phases": phases.seconds},
    )
    watch.bank(bank, report.error, report.seconds)
    return report


def _watch_steps(bank: BankPlan, watch: Observer, phases: PhaseClock, first: int) -> Callable[[StepRecord], None]:
    """Pass a fit's records on; the warm start ends with the one numbered `first`."""

    def on_step(record: StepRecord) -> None:
        if record.step == first:
            phases.end("warm start")
        watch.step(bank, record)

    return on_step


def _scope_record(number: int) -> str:
    return f"scope-{number:05d}"


def _file(number: int, total: int) -> str:
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"
