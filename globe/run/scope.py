"""One scope: its experts are read, fitted, written and forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from globe.bank_shape import sides
from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.checkpoint.kept import kept_tensors
from globe.checkpoint.report import BankReport, CodedReport
from globe.checkpoint.stacks import read_family
from globe.checkpoint.tensor_files import save_tensors
from globe.experts.decoded import decoded
from globe.experts.on_disk import Stack
from globe.experts.stack import read_stack
from globe.experts.storage import StoredFactors, to_storage
from globe.experts.streamed import StreamedExperts
from globe.machine.memory import FITS_EXHAUSTED, explained_exhaustion
from globe.measure.compensate import Compensation
from globe.model.coded_spec import CodedSpec, stored_parts
from globe.model.factor_check import RUN_METADATA
from globe.model.names import TRIPWIRE_SHAPE, dense_halves
from globe.plan.scopes import BankPlan
from globe.run.coding import CodingPlan, code_family
from globe.run.compensation import LayersInOrder
from globe.run.folder import RunFolder
from globe.run.job import Job
from globe.run.observer import Observer, describe
from globe.run.phases import PhaseClock
from globe.run.prepare import Preparation
from globe.run.rounding import RoundingPlan, round_layer
from globe.terms import Family
from globe.train.fit_banks import fit_bank
from globe.train.result import FitResult, StepRecord


def is_finished(folder: RunFolder, number: int, watch: Observer) -> bool:
    """Whether a scope's record is there and its files are as they were written."""
    record = folder.records.read(scope_record(number))
    if record is None:
        return False
    if folder.holds({file: content["sha256"] for file, content in record["files"].items()}):
        return True
    folder.records.remove(scope_record(number))
    watch.prepare(f"finished scope {number} has been damaged since: fitting it again")
    return False


def fit_scope(
    job: Job,
    preparation: Preparation,
    folder: RunFolder,
    number: int,
    watch: Observer,
    in_order: LayersInOrder | None = None,
) -> None:
    """Fit the banks of one scope, or code its experts, and write what is stored of them, then the record of it."""
    with explained_exhaustion(f"fitting scope {number + 1} on {job.config.device}", FITS_EXHAUSTED):
        _fit_scope(job, preparation, folder, number, watch, in_order)
    watch.scope(preparation.scopes[number])


def _fit_scope(
    job: Job,
    preparation: Preparation,
    folder: RunFolder,
    number: int,
    watch: Observer,
    in_order: LayersInOrder | None,
) -> None:
    scope, record = preparation.scopes[number], ScopeRecord()
    if job.config.is_packed:
        run = _round(job, preparation, number, watch, record)
    elif job.config.is_coded:
        run = _code(job, preparation, number, watch, record, in_order)
    else:
        run = (_stream if job.config.stream else _fit)(job, preparation, folder, number, watch, record)
    for piece, (file, tensors) in enumerate(zip(job.factor_files(number), run, strict=True)):
        for index in scope.layers[piece : piece + 1] if job.config.stream else scope.layers:
            for family in dense_halves(job.config.families):
                tensors[job.names.dense(index, family)] = read_family(job.checkpoint, job.layers[index], family)
        if number == piece == 0 and not job.config.is_packed:
            dtype = _factor_dtype(job, scope.layers[0])
            tensors[job.names.tripwire(job.compressed())] = torch.zeros(TRIPWIRE_SHAPE, dtype=dtype)
        sha256 = save_tensors(folder.path / file, tensors, {RUN_METADATA: folder.records.identity})
        record.files[file] = {"sha256": sha256, "tensors": {name: tensor.nbytes for name, tensor in tensors.items()}}
    job.check_unchanged(folder.records.run["fingerprint"])
    folder.records.write(scope_record(number), dataclasses.asdict(record))
    for path in folder.records.folder.glob(f"state-{number}-*.safetensors"):
        path.unlink()


@dataclasses.dataclass
class ScopeRecord:
    """What is known of a finished scope."""

    banks: list[BankReport] = dataclasses.field(default_factory=list[BankReport])
    coded: list[CodedReport] = dataclasses.field(default_factory=list[CodedReport])
    specs: list[dict[str, Any]] = dataclasses.field(default_factory=list[dict[str, Any]])
    """What config.json says of the coded families."""
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict[str, dict[str, Any]])
    """SHA-256 and the bytes of each tensor, by file."""


def follow(job: Job, preparation: Preparation, folder: RunFolder, number: int, compensation: Compensation) -> None:
    """Have a compensation go through the layers of a finished scope."""
    record = folder.records.read(scope_record(number))
    assert record is not None
    specs = [CodedSpec.from_dict(entry) for entry in record["specs"]]
    (file,) = record["files"]
    with safe_open(folder.path / file, framework="pt") as tensors:
        for index in preparation.scopes[number].layers:
            done: dict[Family, Stack] = {}
            for spec in (spec for spec in specs if spec.layer == index):
                layer = job.layers[index]
                N, K = sides(layer, spec.family)
                shapes = spec.shapes((layer.num_experts, N, K))
                parts = {part: tensors.get_tensor(job.names.coded(index, spec.family, part)) for part in shapes}
                coded, dtype = spec.experts(parts, K), TORCH_DTYPES[layer.dtype]
                done[spec.family] = decoded(spec.family, coded, dtype, compensation.scratch)
            compensation.go_through(index, done)


def _code(
    job: Job,
    preparation: Preparation,
    number: int,
    watch: Observer,
    record: ScopeRecord,
    in_order: LayersInOrder | None,
) -> Iterator[dict[str, Tensor]]:
    """All tensors of the coded experts of a scope's layers."""
    calibration = preparation.calibration
    assert isinstance(preparation.coding, CodingPlan)
    assert calibration.sensitivities is not None
    known = job, preparation.coding, calibration.statistics, calibration.sensitivities
    tensors: dict[str, Tensor] = {}
    for index in preparation.scopes[number].layers:
        if in_order is None:
            layer = [code_family(*known, index, family) for family in job.config.families]
        else:
            layer = in_order.code(index)
        for coded in layer:
            parts = stored_parts(coded.experts)
            tensors |= {job.names.coded(index, coded.spec.family, part): x for part, x in parts.items()}
            record.coded.append(coded.report)
            record.specs.append(coded.spec.to_dict())
        watch.coded([coded.report for coded in layer])
    yield tensors


def _round(
    job: Job, preparation: Preparation, number: int, watch: Observer, record: ScopeRecord
) -> Iterator[dict[str, Tensor]]:
    """The same in the format of compressed-tensors."""
    assert isinstance(preparation.coding, RoundingPlan)
    tensors: dict[str, Tensor] = {}
    for index in preparation.scopes[number].layers:
        for packed, report in round_layer(job, preparation.coding, preparation.calibration.statistics, index):
            tensors |= packed
            record.coded.append(report)
        watch.coded(record.coded[-len(job.config.families) :])
    yield tensors


def _fit(
    job: Job, preparation: Preparation, folder: RunFolder, number: int, watch: Observer, record: ScopeRecord
) -> Iterator[dict[str, Tensor]]:
    """All tensors of a scope's banks at once; the banks' reports are added to the `record`."""
    del folder
    tensors: dict[str, Tensor] = {}
    for bank in preparation.scopes[number].banks:
        phases = PhaseClock()
        stack = read_stack(job.checkpoint, job.layers, bank, preparation.calibration.statistics)
        config = job.config.fit_config(bank.shape)
        phases.end("reading")
        result = fit_bank(stack.weights, config, _watch_steps(bank, watch, phases), metric=stack.metric)
        phases.end("fit")
        stored = to_storage(stack, result.factors, _factor_dtype(job, bank.layers[0]))
        phases.end("storing")
        tensors |= {job.names.bases(job.spec(bank)): stored.bases, **_named(job, stored)}
        record.banks.append(_report(bank, result, [stored], phases, watch))
    yield tensors


def _stream(
    job: Job, preparation: Preparation, folder: RunFolder, number: int, watch: Observer, record: ScopeRecord
) -> Iterator[dict[str, Tensor]]:
    """The same, a layer at a time, no more than one of them in memory; the bases come with the first."""
    scope = preparation.scopes[number]
    statistics = preparation.calibration.statistics
    streams = [StreamedExperts(job.checkpoint, job.layers, bank, statistics) for bank in scope.banks]
    results, clocks = list[FitResult](), list[PhaseClock]()
    for place, (bank, stream) in enumerate(zip(scope.banks, streams, strict=True)):
        clocks.append(PhaseClock())
        state = folder.file(f"state-{number}-{place}.safetensors")
        if state.exists() and kept_tensors(state) is None:
            watch.prepare(
                f"the saved state of the fit of {describe(bank)} has been damaged since: fitting it from the start"
            )
            state.unlink()
        results.append(stream.fit(job.config.fit_config(bank.shape), _watch_steps(bank, watch, clocks[-1]), state))
        clocks[-1].end("fit")
    stores = [
        stream.store(result.factors, _factor_dtype(job, scope.layers[0]))
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
        record.banks.append(_report(bank, result, stored, phases, watch))


def _factor_dtype(job: Job, layer: int) -> torch.dtype:
    return TORCH_DTYPES[job.factor_dtype(layer)]


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
    report = BankReport(
        list(bank.layers),
        list(bank.families),
        bank.shape,
        result.outcome,
        sum(phases.seconds.values()),
        errors,
        expert_errors,
        step_columns(result),
        {**dataclasses.asdict(result.stats), "phases": phases.seconds},
    )
    watch.bank(bank, report.error, report.seconds)
    return report


def _watch_steps(bank: BankPlan, watch: Observer, phases: PhaseClock) -> Callable[[StepRecord], None]:
    """Pass a fit's records on; the warm start ends with the first."""

    def on_step(record: StepRecord) -> None:
        if record.step == 0:
            phases.end("warm start")
        watch.step(bank, record)

    return on_step


def step_columns(result: FitResult) -> dict[str, list[float]]:
    """The step records as columns, rounded to six significant digits."""
    names = [field.name for field in dataclasses.fields(StepRecord)]
    return {name: [float(f"{getattr(record, name):.6g}") for record in result.steps] for name in names}


def scope_record(number: int) -> str:
    return f"scope-{number:05d}"
