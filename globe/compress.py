"""From a checkpoint to a compressed one, a scope at a time: read its experts, fit, write its factors, forget it.

The output is built beside its name, in `<output>.partial`. A scope is finished when its record is on disk, after its
factors; a killed run goes on after the last finished scope, and only the whole output gets its name.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globe import allocate, runnable
from globe.calibrate import CalibrationText, calibrate, load_statistics, read_calibration_text, save_statistics
from globe.checkpoint.header import TORCH_DTYPES
from globe.checkpoint.layout import ExpertLayer, Family, find_expert_layers, source_names
from globe.checkpoint.reader import CONFIG, Checkpoint, open_checkpoint
from globe.checkpoint.source import open_source
from globe.checkpoint.stacks import read_family
from globe.checkpoint.writer import (
    claim,
    copy_side_files,
    copy_tensors,
    finish,
    require_space,
    save_tensors,
    write_index,
    write_json,
)
from globe.config import CompressConfig
from globe.empty_model import check_same_experts, empty_model
from globe.evaluate import load
from globe.experts import StoredFactors, read_stack, to_storage
from globe.metric import LayerStatistics
from globe.model.autoload import AUTO_MAP, write_autoload
from globe.model.bank_spec import BankSpec, encoding_of
from globe.model.expert_modules import factor_names, find_experts
from globe.model.names import dense_halves, tripwire_tensor
from globe.model.quantization_config import GlobeQuantizationConfig
from globe.phases import PhaseClock
from globe.plan import BankPlan, make_plan, scope_from_json
from globe.progress import Observer, Observers
from globe.report import REPORT, BankReport, CalibrationReport, Report, peak_memory, step_columns, versions
from globe.run_record import RUN, as_json, resume_or_begin
from globe.samples import sample_windows
from globe.shipped import resolve_model
from globe.source_layout import write_source_layout
from globe.streamed import StreamedExperts
from globe.train.fit_banks import fit_bank
from globe.train.result import FitResult, StepRecord

PLAN = "plan.json"
"""In an unfinished output: the shapes of the banks, decided before any work."""
STATISTICS = "calibration.safetensors"
"""In an unfinished output: what the calibration text said of the layers."""


def compress(
    model: str | Path,
    output: str | Path,
    config: CompressConfig = CompressConfig(),  # noqa: B008
    observers: Iterable[Observer] = (),
) -> Report:
    """Compress the routed experts of `model` (a local folder, a Hub id, or "shipped") into the folder `output`.

    The output is a Hugging Face checkpoint that `AutoModelForCausalLM` loads after `import globe`. Memory follows the
    largest scope, and the model itself where that is run: to calibrate and to plan, if it takes less than half of the
    machine's. A run on the output of a killed one goes on after its last finished scope.

    Raises, all of them `GlobeError`: `SettingsError` for settings that do not fit the model or differ from those of the
    run to go on with; `CheckpointError` for damaged files and weights that are not finite; `UnsupportedModelError` for
    what is no mixture of experts that GloBE knows; `OutputError` if the output exists or the disk is full.
    """
    watch = Observers(observers)
    try:
        return _compress(model, Path(output), config, watch)
    finally:
        watch.stop()


def _compress(model: str | Path, output: Path, config: CompressConfig, watch: Observer) -> Report:
    checkpoint = open_source(resolve_model(model))
    job = Job(checkpoint, config)
    partial = claim(output)
    job.resume_or_begin(partial, str(model))
    written = sum(path.stat().st_size for path in partial.glob("model-*.safetensors"))
    require_space(partial, job.predicted_bytes() - written)
    job.prepare(partial, watch)
    finished = [_read_record(partial, number) for number in range(len(job.scopes))]
    num_finished = next((number for number, record in enumerate(finished) if record is None), len(finished))
    watch.start(job.scopes, num_finished)
    for number in range(num_finished, len(job.scopes)):
        job.run_scope(partial, number, watch)
        watch.scope(job.scopes[number])
    report = job.assemble(partial, str(model))
    finish(partial, output)
    return report


class Job:
    """What a compression does, decided before any work."""

    def __init__(self, checkpoint: Checkpoint, config: CompressConfig) -> None:
        self.checkpoint, self.config = checkpoint, config.resolved()
        self.layers: dict[int, ExpertLayer] = {layer.index: layer for layer in find_expert_layers(checkpoint)}
        self.scopes = make_plan(list(self.layers.values()), self.config)
        self.uniform_because: str | None = None
        model = empty_model(checkpoint)
        check_same_experts(self.layers, find_experts(model))
        self.names = factor_names(model)
        self.uncalibrated_because: str | None = None
        self.calibration_text: CalibrationText | None = None
        if self.config.calibrate not in ("samples", "none"):
            name, most = self.config.calibrate, self.config.calibration_tokens
            self.calibration_text = read_calibration_text(checkpoint.folder, name, most)
        self.statistics: dict[int, LayerStatistics] | None = None
        self.calibration: CalibrationReport | None = None
        self.prepare_seconds = 0.0
        self._replaced = {name for scope in self.scopes for index in scope.layers for name in self._sources(index)}
        self._kept = {
            shard: [t.name for t in checkpoint.shard_tensors(shard) if t.name not in self._replaced]
            for shard in checkpoint.shards
        }
        self._dense_shards = [shard for shard in checkpoint.shards if self._kept[shard]]

    @property
    def specs(self) -> list[BankSpec]:
        return [self._spec(bank) for scope in self.scopes for bank in scope.banks]

    def dtype(self, layer: int) -> torch.dtype:
        """What a layer's factors in floating point are stored in."""
        if self.config.factor_dtype in ("float32", "bfloat16", "float16"):
            return getattr(torch, self.config.factor_dtype)
        return TORCH_DTYPES[self.layers[layer].dtype]

    def predicted_bytes(self) -> int:
        """Of the output's tensors."""
        kept = sum(self.checkpoint.tensors[name].nbytes for names in self._kept.values() for name in names)
        factors = sum(
            bank.stored_bytes(self.config.precision, self.dtype(bank.layers[0]).itemsize)
            for scope in self.scopes
            for bank in scope.banks
        )
        halves = sum(
            layer.num_experts * layer.intermediate_size * layer.hidden_size * TORCH_DTYPES[layer.dtype].itemsize
            for scope in self.scopes
            for layer in (self.layers[index] for index in scope.layers)
            for _ in dense_halves(self.config.families)
        )
        return kept + factors + halves

    def original_bytes(self) -> int:
        """Of the source's tensors."""
        return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())

    def resume_or_begin(self, partial: Path, source: str) -> None:
        """Check that an unfinished output is of this very run, or begin one."""
        resume_or_begin(
            partial,
            {
                "source": source,
                "fingerprint": self.checkpoint.fingerprint(),
                "globe_version": versions()["globe"],
                "config": dataclasses.asdict(self.config),
                "calibration": None if self.calibration_text is None else self.calibration_text.fingerprint,
            },
        )

    def calibrate(self) -> None:
        """Run the model on the calibration text, or on samples of its own, if that is asked for.

        A model that cannot be run is fitted uncalibrated where the samples are no more than the default; the reason is
        kept.
        """
        if self.config.calibrate == "none":
            self.uncalibrated_because = "that is asked for"
            return
        if self.calibration_text is None:
            self.uncalibrated_because = runnable.obstacle(self.checkpoint)
            if self.uncalibrated_because is not None:
                return
        model = load(self.checkpoint.fetched(), self.config.device)
        if self.calibration_text is None:
            try:
                self.calibration_text = CalibrationText("samples", sample_windows(model, self.config.seed))
            except Exception as error:
                self.uncalibrated_because = f"the model does not generate: {type(error).__name__}: {error}"
                return
        text, layers = self.calibration_text, {index for scope in self.scopes for index in scope.layers}
        self.statistics = calibrate(model, text.windows, layers)
        self.calibration = CalibrationReport(
            text.name,
            text.fingerprint,
            text.windows.numel(),
            sum(len(found.counts) for found in self.statistics.values()),
            {str(layer): found.unreached for layer, found in self.statistics.items() if found.unreached},
        )

    def allocate(self) -> None:
        """Share the budget out among the banks, or keep the uniform plan and the reason for it."""
        self.uniform_because = allocate.obstacle(self.checkpoint, self.config, len(self.specs))
        if self.uniform_because is None:
            windows = None if self.calibration_text is None else self.calibration_text.windows
            self.scopes = allocate.allocated(self.checkpoint, self.layers, self.scopes, self.config, windows)

    def prepare(self, partial: Path, watch: Observer) -> None:
        """Calibrate and make the plan, or take up those of the unfinished run."""
        path, statistics = partial / PLAN, partial / STATISTICS
        if not path.exists():
            began = time.monotonic()
            if self.config.calibrate != "none":
                watch.prepare("running the model to calibrate")
            self.calibrate()
            if self.statistics is not None:
                save_statistics(statistics, self.statistics)
            watch.prepare("planning")
            self.allocate()
            record = {
                "uncalibrated_because": self.uncalibrated_because,
                "calibration": self.calibration and dataclasses.asdict(self.calibration),
                "uniform_because": self.uniform_because,
                "scopes": [dataclasses.asdict(scope) for scope in self.scopes],
                "seconds": time.monotonic() - began,
            }
            write_json(path, record)
        record = json.loads(path.read_text())
        self.uncalibrated_because, self.uniform_because = record["uncalibrated_because"], record["uniform_because"]
        if record["calibration"] is not None:
            self.calibration = CalibrationReport(**record["calibration"])
            self.statistics = load_statistics(statistics)
        self.scopes = [scope_from_json(scope) for scope in record["scopes"]]
        self.prepare_seconds = record["seconds"]

    def run_scope(self, partial: Path, number: int, watch: Observer) -> None:
        """Fit the banks of one scope and write their factors, then their record."""
        scope, reports, files = self.scopes[number], list[BankReport](), dict[str, dict[str, int]]()
        run = self._stream(partial, number, watch, reports) if self.config.stream else self._fit(number, watch, reports)
        for piece, tensors in enumerate(run):
            for index in scope.layers[piece : piece + 1] if self.config.stream else scope.layers:
                for family in dense_halves(self.config.families):
                    tensors[self.names.dense(index, family)] = read_family(self.checkpoint, self.layers[index], family)
            if number == piece == 0:
                tensors[self.names.tripwire(self.specs)] = tripwire_tensor(self.dtype(scope.layers[0]))
            file = self._file(self._first_file(number) + piece)
            save_tensors(partial / file, tensors)
            files[file] = _sizes(tensors)
        record = [dataclasses.asdict(report) for report in reports]
        write_json(partial / _record_file(number), {"banks": record, "files": files})
        _remove_states(partial)

    def assemble(self, partial: Path, source: str) -> Report:
        """Add everything that is not a factor and check the whole."""
        weight_map: dict[str, str] = {}
        compressed_bytes = 0
        banks: list[BankReport] = []
        for number in range(len(self.scopes)):
            record = _read_record(partial, number)
            assert record is not None
            banks += [BankReport(**bank) for bank in record["banks"]]
            for file, tensors in record["files"].items():
                weight_map |= dict.fromkeys(tensors, file)
                compressed_bytes += sum(tensors.values())
        for offset, shard in enumerate(self._dense_shards):
            file = self._file(self._first_file(len(self.scopes)) + offset)
            copy_tensors(self.checkpoint, shard, self._kept[shard], partial / file)
            weight_map |= dict.fromkeys(self._kept[shard], file)
            compressed_bytes += sum(self.checkpoint.tensors[name].nbytes for name in self._kept[shard])
        report = Report(
            source,
            self.checkpoint.fingerprint(),
            as_json(dataclasses.asdict(self.config)),
            versions(),
            banks,
            self.original_bytes(),
            compressed_bytes,
            self.prepare_seconds + sum(bank.seconds for bank in banks),
            peak_memory(),
            self.calibration,
            self.uncalibrated_because,
            self.uniform_because,
            list(self.checkpoint.notes),
        )
        copy_side_files(self.checkpoint, partial)
        write_source_layout(partial, self.checkpoint)
        write_index(partial, weight_map, compressed_bytes)
        write_json(partial / REPORT, report.to_json())
        section = GlobeQuantizationConfig(
            self.specs, self.config.activation, globe_version=versions()["globe"]
        ).to_dict()
        write_autoload(partial)
        write_json(partial / CONFIG, {**self.checkpoint.config, "auto_map": AUTO_MAP, "quantization_config": section})
        open_checkpoint(partial)
        for number in range(len(self.scopes)):
            (partial / _record_file(number)).unlink()
        _remove_states(partial)
        (partial / STATISTICS).unlink(missing_ok=True)
        (partial / PLAN).unlink()
        (partial / RUN).unlink()
        return report

    def _fit(self, number: int, watch: Observer, reports: list[BankReport]) -> Iterator[dict[str, Tensor]]:
        """All tensors of a scope's banks at once; the banks' reports are added to `reports`."""
        tensors: dict[str, Tensor] = {}
        for bank in self.scopes[number].banks:
            phases = PhaseClock()
            stack = read_stack(self.checkpoint, self.layers, bank, self.statistics)
            config = self.config.fit_config(bank.rank, bank.num_bases)
            phases.end("reading")
            result = fit_bank(stack.weights, config, _watch_steps(bank, watch, phases, 0), metric=stack.metric)
            phases.end("fit")
            stored = to_storage(stack, result.factors, self.dtype(bank.layers[0]), self.config.precision)
            phases.end("storing")
            tensors |= {self.names.bases(self._spec(bank)): stored.bases, **self._named(stored)}
            reports.append(self._report(bank, result, [stored], phases, watch))
        yield tensors

    def _stream(
        self, partial: Path, number: int, watch: Observer, reports: list[BankReport]
    ) -> Iterator[dict[str, Tensor]]:
        """The same, a layer at a time, no more than one of them in memory; the bases come with the first."""
        scope, precision = self.scopes[number], self.config.precision
        streams = [StreamedExperts(self.checkpoint, self.layers, bank, self.statistics) for bank in scope.banks]
        results, clocks = list[FitResult](), list[PhaseClock]()
        for place, (bank, stream) in enumerate(zip(scope.banks, streams, strict=True)):
            clocks.append(PhaseClock())
            config, state = self.config.fit_config(bank.rank, bank.num_bases), partial / _state_file(number, place)
            results.append(stream.fit(config, _watch_steps(bank, watch, clocks[-1], 1), state))
            clocks[-1].end("fit")
        stores = [
            stream.store(result.factors, self.dtype(scope.layers[0]), precision)
            for stream, result in zip(streams, results, strict=True)
        ]
        kept: list[list[StoredFactors]] = [[] for _ in streams]
        for layer in zip(*stores, strict=True):
            tensors: dict[str, Tensor] = {}
            for bank, stored, errors in zip(scope.banks, layer, kept, strict=True):
                tensors |= self._named(stored)
                if not errors:
                    tensors[self.names.bases(self._spec(bank))] = stored.bases
                errors.append(dataclasses.replace(stored, adapters={}, codes={}, bases=stored.bases.new_empty(0)))
            yield tensors
        for bank, result, stored, phases in zip(scope.banks, results, kept, clocks, strict=True):
            reports.append(self._report(bank, result, stored, phases, watch))

    def _named(self, stored: StoredFactors) -> dict[str, Tensor]:
        """Adapters and codes by their names in the output."""
        adapters = {self.names.adapters(*key): tensor for key, tensor in stored.adapters.items()}
        return adapters | {self.names.codes(*key): tensor for key, tensor in stored.codes.items()}

    def _report(
        self, bank: BankPlan, result: FitResult, stored: Sequence[StoredFactors], phases: PhaseClock, watch: Observer
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

    def _spec(self, bank: BankPlan) -> BankSpec:
        return BankSpec(bank.layers, bank.families, bank.rank, bank.num_bases, encoding_of(self.config.precision))

    def _sources(self, index: int) -> list[str]:
        """The layer's source tensors that the output replaces: of its families in banks and of the dense halves."""
        families: set[Family] = {*self.config.families, *dense_halves(self.config.families)}
        return [name for family in families for name in source_names(self.layers[index], family)]

    def _file(self, number: int) -> str:
        total = self._first_file(len(self.scopes)) + len(self._dense_shards)
        return f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    def _first_file(self, number: int) -> int:
        """Of the scope's: one, or one for each layer where layers are streamed."""
        return sum(len(scope.layers) if self.config.stream else 1 for scope in self.scopes[:number])


def _watch_steps(bank: BankPlan, watch: Observer, phases: PhaseClock, first: int) -> Callable[[StepRecord], None]:
    """Pass a fit's records on; the warm start ends with the one numbered `first`."""

    def on_step(record: StepRecord) -> None:
        if record.step == first:
            phases.end("warm start")
        watch.step(bank, record)

    return on_step


def _state_file(number: int | str, place: int | str) -> str:
    """In an unfinished output: where the fit of a scope's bank was when it was last saved."""
    return f"state-{number}-{place}.safetensors"


def _remove_states(partial: Path) -> None:
    for path in partial.glob(_state_file("*", "*")):
        path.unlink()


def _record_file(number: int) -> str:
    return f"scope-{number:05d}.json"


def _read_record(partial: Path, number: int) -> dict[str, Any] | None:
    path = partial / _record_file(number)
    return json.loads(path.read_text()) if path.exists() else None


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in tensors.items()}
