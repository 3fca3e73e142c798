"""A grid of compressions of one model, each judged on the same text beside the original.

A point is finished when its record is on disk; a killed sweep goes on after the last finished one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from globe.checkpoint.card import keep_evaluation
from globe.checkpoint.digest import file_sha256
from globe.checkpoint.evaluation import Evaluation, TaskScore
from globe.checkpoint.manifest import MANIFEST, Manifest, verify_files, write_manifest
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import Report
from globe.checkpoint.shipped import resolve_model
from globe.checkpoint.writer import TEMPORARY, make_folder
from globe.errors import CheckpointError, GlobeError, OutputError
from globe.machine.device import usable_device
from globe.measure.evaluate import evaluate_model, read_windows, windows_fingerprint
from globe.measure.placed_model import place_model
from globe.measure.settings import EvaluateConfig
from globe.measure.tasks import Tasks
from globe.measure.tokenizers import load_tokenizer
from globe.plan.settings import CompressConfig
from globe.run.compress import compress
from globe.run.folder import PARTIAL, UNFINISHED, held
from globe.run.observer import Observer
from globe.run.records import RUN, Records
from globe.sweeps.settings import Setting, SweepConfig
from globe.typed import parsed
from globe.version import versions

_ORIGINAL, _POINTS, _MODELS = "original", "points", "models"


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
        return parsed(cls, content, "the record of a point", CheckpointError)


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
    config: SweepConfig = SweepConfig(),  # noqa: B008
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
    """The original, loaded once or run a layer at a time, and the text on which all are judged."""

    def __init__(self, model: str | Path, config: EvaluateConfig) -> None:
        resolved = resolve_model(model)
        self._config = config
        self._tasks = Tasks(config.tasks) if config.tasks else None
        folder = open_checkpoint(resolved).folder
        self._tokenizer = load_tokenizer(folder, config.trust_remote_code)
        self._windows, self._bytes_per_token = read_windows(folder, config)
        self._original = self._run(resolved, "the original")

    def original(self) -> Evaluation:
        return self._evaluate(self._original)

    def compressed(self, folder: Path, original: Evaluation) -> Evaluation:
        """Recorded in the folder, too."""
        evaluation = dataclasses.replace(
            self._evaluate(self._run(folder, "the model"), self._original, original.tasks),
            reference="the original",
            reference_fingerprint=Report.read(folder).fingerprint,
        )
        keep_evaluation(folder, evaluation)
        return evaluation

    def _run(self, model: str | Path, name: str) -> Any:
        placed = place_model(model, self._config.device)
        if self._tasks is not None:
            placed.check_tasks()
        return placed.run(self._windows, self._config.batch, name)

    def _evaluate(self, model: Any, reference: Any = None, beside: Sequence[TaskScore] = ()) -> Evaluation:
        windows, batch = self._windows, self._config.batch
        evaluation = evaluate_model(model, windows, self._bytes_per_token, batch=batch, reference=reference)
        scores = [] if self._tasks is None else self._tasks.run(model, self._tokenizer, batch, beside)
        text = Path(self._config.text).name
        return dataclasses.replace(evaluation, text=text, fingerprint=windows_fingerprint(windows), tasks=scores)


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
            for folder in (output, output / _POINTS):
                for leftover in folder.glob(f"*.????????{TEMPORARY}"):  # of a write that was killed
                    leftover.unlink()
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
        return None if record is None else parsed(Evaluation, record, _ORIGINAL, CheckpointError)

    def write_original(self, evaluation: Evaluation) -> None:
        self._records.write(_ORIGINAL, dataclasses.asdict(evaluation))

    def point(self, number: int, point: dict[str, Setting], judge: Judge, observers: Iterable[Observer]) -> PointRecord:
        """Compress and judge one point; a compression that was interrupted is gone on with."""
        folder = self._output / _MODELS / f"{number:05d}"
        began = time.monotonic()
        try:
            report = self._compressed(folder, self._config.at(point), observers)
            fitted = time.monotonic()
            original = self.original()
            assert original is not None
            evaluation = judge.compressed(folder, original)
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
