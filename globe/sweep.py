"""A grid of compressions of one model, each judged on the same text beside the original.

A point is finished when its record is on disk; a killed sweep goes on after the last finished one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from globe.bank.activations import Activation
from globe.bank.codes import CodeMap
from globe.checkpoint.digest import file_sha256
from globe.checkpoint.manifest import MANIFEST, Manifest, verify_files, write_manifest
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.writer import make_folder
from globe.compress import compress
from globe.config import CompressConfig
from globe.device import usable_device
from globe.errors import CheckpointError, GlobeError, OutputError, SettingsError
from globe.evaluate import EvaluateConfig, Evaluation, evaluate_model, read_windows
from globe.init.warm_start import WarmStartName
from globe.loading import load
from globe.progress import Observer
from globe.records import RUN, Records
from globe.report import Report, versions
from globe.run_folder import PARTIAL, UNFINISHED, held
from globe.shipped import resolve_model
from globe.typed import fit_settings, shown

AXES = ("keep", "scope", "layers", "activation", "codes", "warm_start")

_ORIGINAL, _POINTS, _MODELS = "original", "points", "models"

Setting = float | str


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The grid, and what all of its points share."""

    keep: tuple[float, ...] = (0.75, 0.625, 0.5)
    """Shares of the parameters to keep."""
    scope: tuple[str, ...] = (CompressConfig.scope,)
    """Experts that share a bank: `layer`, `model`, or a number of consecutive layers."""
    layers: tuple[str, ...] = ("all",)
    """Choices of layers, each `all` or indices without spaces: `12`, `0-3`, `0-3,7`."""
    activation: tuple[Activation, ...] = (CompressConfig.activation,)
    """φ between bank and adapter."""
    codes: tuple[CodeMap, ...] = (CompressConfig.codes,)
    """Codes: signed (ridge) or on the simplex."""
    warm_start: tuple[WarmStartName, ...] = (CompressConfig.warm_start,)
    """Where each fit begins."""
    common: CompressConfig = CompressConfig()
    """All other settings, the same at every point."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What every point is judged on."""
    save_models: bool = False
    """Keep the compressed models and not only their records."""
    trust_remote_code: bool = False
    """Run the code of a tokenizer that brings its own, to calibrate and to judge."""

    def __post_init__(self) -> None:
        fit_settings(self, SettingsError)
        if self.trust_remote_code:
            for name in ("common", "evaluate"):
                trusting = dataclasses.replace(getattr(self, name), trust_remote_code=True)
                object.__setattr__(self, name, trusting)
        for axis in AXES:
            values = getattr(self, axis)
            if not values or len(set(values)) < len(values):
                raise SettingsError(f"{axis} holds {list(values)}; give one or more values, each once")
            if getattr(self.common, axis) != getattr(CompressConfig, axis):
                raise SettingsError(f"{axis} is an axis of the sweep: give its values there, not among what is common")
        if self.common.rank_ratio is not None:
            raise SettingsError("a sweep chooses rank and bases by keep: leave out rank_ratio and basis_ratio")
        for choice in self.layers:
            parse_layers(choice)
        for keep, scope in itertools.product(self.keep, self.scope):
            CompressConfig(keep=keep, scope=scope)

    def points(self) -> list[dict[str, Setting]]:
        """The settings of every point along the axes; the last axis varies fastest."""
        return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*self._values())]

    def varying(self) -> list[str]:
        """The axes that have more than one value."""
        return [axis for axis, values in zip(AXES, self._values(), strict=True) if len(values) > 1]

    def at(self, point: dict[str, Setting]) -> CompressConfig:
        """The compression that a point stands for; `SettingsError` if it cannot be."""
        settings: dict[str, Any] = {**point, "layers": parse_layers(str(point["layers"]))}
        return dataclasses.replace(self.common, **settings)

    def _values(self) -> list[tuple[Setting, ...]]:
        return [getattr(self, axis) for axis in AXES]


def parse_layers(choice: str) -> tuple[int, ...] | None:
    """`all` is None; `0-3,7` is (0, 1, 2, 3, 7). Raises `SettingsError` for anything else."""
    if choice == "all":
        return None
    if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", choice, re.ASCII):
        raise SettingsError(f"layers {shown(choice)} is not understood; write all, 12, 0-3 or 0-3,7")
    runs = [[int(end) for end in run.split("-")] for run in choice.split(",")]
    if backwards := next((run for run in runs if run[0] > run[-1]), None):
        raise SettingsError(f"layers {backwards[0]}-{backwards[1]} runs backwards; write {backwards[1]}-{backwards[0]}")
    return tuple(sorted({index for run in runs for index in range(run[0], run[-1] + 1)}))


@dataclasses.dataclass(frozen=True)
class PointRecord:
    """What came of one point. Where it failed, only settings, message and seconds say something."""

    settings: dict[str, Setting]
    """Its values on the axes."""
    seconds: float
    """Compression and evaluation, over all runs that the compression took."""
    failure: str | None = None
    """The message of the error that ended it."""
    kept: float | None = None
    """Stored parameters of the compressed families over the original ones."""
    error: float | None = None
    """Relative Frobenius error as stored: root mean square over layers and families."""
    family_errors: dict[str, float] | None = None
    compressed_bytes: int | None = None
    """Of all tensors of the output."""
    evaluation: Evaluation | None = None
    """Against the original."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PointRecord:
        evaluation = content["evaluation"]
        return cls(**{**content, "evaluation": None if evaluation is None else Evaluation(**evaluation)})


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """All points, in the order of the grid, and what they are compared with."""

    config: SweepConfig
    source: str
    original_bytes: int
    original: Evaluation
    points: list[PointRecord]


class SweepObserver(Protocol):
    """In this order: start, then for each point still to do point and record; stop at the end or on a fault."""

    def start(self, points: Sequence[dict[str, Setting]], num_finished: int) -> None: ...

    def point(self, description: str) -> Iterable[Observer]:
        """A point is begun; returns who watches its compression."""
        ...

    def record(self, description: str, record: PointRecord) -> None:
        """A point's record is on disk."""
        ...

    def stop(self) -> None: ...


def sweep(
    model: str | Path,
    output: str | Path,
    config: SweepConfig = SweepConfig(),
    watch: SweepObserver | None = None,
    *,
    overwrite: bool = False,
) -> SweepResult:
    """Compress `model` at every point of the grid, judge each against the original, and record it in `output`.

    A sweep on the folder of a killed or finished one only does the points that have no record yet, or whose record was
    damaged since. A point that cannot be compressed or judged is recorded as failed, with the message, and the sweep
    goes on; remove its record to try it again. With `overwrite`, a sweep with other settings is started anew.

    Raises, all of them `GlobeError`: `SettingsError` for a folder with a sweep of other settings, or a text that is
    too short; `CheckpointError` if the original cannot be loaded; `OutputError` if the folder holds other things,
    another process is at it, or the disk is full.
    """
    config = dataclasses.replace(  # a sweep goes on where it began, not where `auto` leads next time
        config,
        common=dataclasses.replace(config.common, device=usable_device(config.common.device)),
        evaluate=dataclasses.replace(config.evaluate, device=usable_device(config.evaluate.device)),
    )
    run = Run(model, Path(output), config)
    with run.begun(overwrite=overwrite):
        points = config.points()
        waiting = [number for number in range(len(points)) if run.read(number) is None]
        original = run.original()
        if watch is not None:
            watch.start(points, len(points) - len(waiting))
        try:
            judge = Judge(model, config.evaluate) if waiting or original is None else None
            if original is None:
                assert judge is not None
                run.write_original(judge.original())
            for number in waiting:
                assert judge is not None
                description = describe_point(points[number], config)
                record = run.point(number, points[number], judge, () if watch is None else watch.point(description))
                run.write(number, record)
                if watch is not None:
                    watch.record(description, record)
        finally:
            if watch is not None:
                watch.stop()
        return run.finish(len(points))


def describe_point(point: dict[str, Setting], config: SweepConfig) -> str:
    """A point by what sets it apart: its values on the axes that vary."""
    axes = config.varying() or ["keep"]
    return ", ".join(f"{axis.replace('_', ' ')} {point[axis]}" for axis in axes)


class Judge:
    """The original, loaded once, and the text on which all are judged."""

    def __init__(self, model: str | Path, config: EvaluateConfig) -> None:
        resolved = resolve_model(model)
        self._config = config
        self._windows, self._bytes_per_token = read_windows(open_checkpoint(resolved).folder, config)
        self._original = load(resolved, config.device)

    def original(self) -> Evaluation:
        return self._evaluate(self._original)

    def compressed(self, folder: Path) -> Evaluation:
        found = self._evaluate(load(folder, self._config.device), reference=self._original)
        return dataclasses.replace(found, reference="the original")

    def _evaluate(self, model: Any, reference: Any = None) -> Evaluation:
        return evaluate_model(
            model, self._windows, self._bytes_per_token, batch=self._config.batch, reference=reference
        )


class Run:
    """The output folder: `run.json`, `original.json`, a record for each point, and models while they are needed."""

    def __init__(self, model: str | Path, output: Path, config: SweepConfig) -> None:
        self._model, self._output, self._config = model, output.expanduser().resolve(), config
        checkpoint = open_checkpoint(resolve_model(model))
        self._original_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        run = {
            "command": "sweep",
            "source": str(model),
            "fingerprint": checkpoint.fingerprint(),
            "globe_version": versions()["globe"],
            "config": dataclasses.asdict(config),
        }
        self._records = Records(self._output, run)

    @contextlib.contextmanager
    def begun(self, *, overwrite: bool) -> Iterator[None]:
        """Hold the folder, which has no other sweep's records then."""
        ours = [_POINTS, _MODELS, UNFINISHED, MANIFEST, f"{RUN}.json", f"{_ORIGINAL}.json"]
        output = self._output
        if output.is_dir() and any(output.iterdir()) and not any((output / name).exists() for name in ours):
            raise OutputError(f"{output} holds files that are not of a sweep: choose another output")
        make_folder(output / UNFINISHED)
        with held(output / UNFINISHED, output):
            if not self._records.begin(f"{_POINTS}/*", overwrite=overwrite):
                for path in (output / _POINTS, output / _MODELS):
                    shutil.rmtree(path, ignore_errors=True)
                for name in (_ORIGINAL, MANIFEST.removesuffix(".json")):
                    self._records.remove(name)
                self._records.write(RUN, self._records.run)
            yield
            shutil.rmtree(output / UNFINISHED)

    def read(self, number: int) -> PointRecord | None:
        """A point's record, if there is one."""
        record = self._records.read(f"{_POINTS}/{number:05d}")
        return None if record is None else PointRecord.from_json(record)

    def write(self, number: int, record: PointRecord) -> None:
        self._records.write(f"{_POINTS}/{number:05d}", dataclasses.asdict(record))

    def original(self) -> Evaluation | None:
        """How the original was judged, if it was."""
        record = self._records.read(_ORIGINAL)
        return None if record is None else Evaluation(**record)

    def write_original(self, evaluation: Evaluation) -> None:
        self._records.write(_ORIGINAL, dataclasses.asdict(evaluation))

    def point(self, number: int, point: dict[str, Setting], judge: Judge, observers: Iterable[Observer]) -> PointRecord:
        """Compress and judge one point; a compression that was interrupted is gone on with."""
        folder = self._output / _MODELS / f"{number:05d}"
        began = time.monotonic()
        try:
            report = self._compressed(folder, self._config.at(point), observers)
            fitted = time.monotonic()
            evaluation = judge.compressed(folder)
        except OutputError:
            raise
        except GlobeError as error:
            self._remove(folder)
            return PointRecord(point, time.monotonic() - began, failure=str(error))
        if not self._config.save_models:
            self._remove(folder)
        return PointRecord(
            point,
            report.seconds + time.monotonic() - fitted,
            None,
            report.kept,
            report.error,
            report.family_errors(),
            report.compressed_bytes,
            evaluation,
        )

    def finish(self, num_points: int) -> SweepResult:
        """All records, listed in the folder's manifest."""
        records, original = [self.read(number) for number in range(num_points)], self.original()
        points = [record for record in records if record is not None]
        assert original is not None
        assert len(points) == num_points
        names = [f"{RUN}.json", f"{_ORIGINAL}.json", *(f"{_POINTS}/{number:05d}.json" for number in range(num_points))]
        files = {name: file_sha256(self._output / name) for name in names}
        write_manifest(self._output, Manifest(self._records.identity, files))
        return SweepResult(self._config, str(self._model), self._original_bytes, original, points)

    def _compressed(self, folder: Path, config: CompressConfig, observers: Iterable[Observer]) -> Report:
        """The report of the point's model, which is compressed unless it is there and as it was written."""
        if (folder / MANIFEST).is_file():
            try:
                verify_files(folder)
                return Report.read(folder)
            except CheckpointError:
                self._remove(folder)
        return compress(self._model, folder, config, observers, overwrite=True)

    def _remove(self, folder: Path) -> None:
        for path in (folder, folder.with_name(f"{folder.name}{PARTIAL}")):
            shutil.rmtree(path, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()
