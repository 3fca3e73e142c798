"""How a sweep goes, on a terminal and in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from globe.plan.scopes import BankPlan, Scope
from globe.run.observer import Observer, clock, describe
from globe.sweeps.settings import Setting
from globe.sweeps.sweep import PointRecord
from globe.terminal import Terminal, one_line
from globe.train.result import StepRecord


class PlainSweep:
    """One line for each point, with the time that the rest will take."""

    def __init__(self, console: Terminal) -> None:
        self._console = console

    def start(self, points: Sequence[Mapping[str, Setting]], num_finished: int) -> None:
        self._left, self._done, self._began = len(points) - num_finished, 0, time.monotonic()
        if num_finished:
            self._console.print(f"going on after {num_finished} of {len(points)} points")

    def point(self, description: str) -> Iterable[Observer]:
        return ()

    def record(self, description: str, record: PointRecord) -> None:
        self._left, self._done = self._left - 1, self._done + 1
        left = clock(self._left * (time.monotonic() - self._began) / self._done)
        self._console.print(
            f"{description}: {outcome(record)}  {record.seconds:.1f} s, {left} left",
            style="none" if record.failure is None else "red",
            soft_wrap=True,
        )

    def stop(self) -> None:
        pass


class LiveSweep(PlainSweep):
    """The same lines above a live display of the points, the present one's scopes and its fit."""

    def __init__(self, console: Terminal, max_steps: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        super().__init__(console)
        self._max_steps = max_steps

    def start(self, points: Sequence[Mapping[str, Setting]], num_finished: int) -> None:
        super().start(points, num_finished)
        self._points = self._progress.add_task("points", total=len(points), completed=num_finished)
        self._progress.start()

    def point(self, description: str) -> Iterable[Observer]:
        return (_PointProgress(self._progress, description, self._max_steps),)

    def record(self, description: str, record: PointRecord) -> None:
        super().record(description, record)
        self._progress.advance(self._points)

    def stop(self) -> None:
        self._progress.stop()


class _PointProgress(Observer):
    """A point's scopes and present fit in the display of the sweep."""

    def __init__(self, progress: Progress, description: str, max_steps: int) -> None:
        self._progress = progress
        self._scopes = progress.add_task(description, total=None)
        self._fit = progress.add_task("starting", total=max_steps)

    def prepare(self, task: str) -> None:
        self._progress.update(self._fit, description=task)

    def note(self, text: str) -> None:
        self._progress.console.print(f"note: {text}", style="yellow", soft_wrap=True)

    def start(self, scopes: Sequence[Scope], num_finished: int) -> None:
        self._progress.update(self._scopes, total=len(scopes), completed=num_finished)

    def step(self, bank: BankPlan, record: StepRecord) -> None:
        self._progress.update(
            self._fit, description=f"{describe(bank)}: objective {record.error:.4f}", completed=record.step
        )

    def scope(self, scope: Scope) -> None:
        self._progress.advance(self._scopes)

    def stop(self) -> None:
        self._progress.remove_task(self._fit)
        self._progress.remove_task(self._scopes)


def outcome(record: PointRecord) -> str:
    """A point's result in a few words."""
    if record.failure is not None or record.evaluation is None:
        return f"failed: {one_line(record.failure or '')}"
    quality = f"KL {record.evaluation.kl:.5f}, perplexity {record.evaluation.perplexity:.3f}"
    return f"relative error {record.error:.4f}, {quality}"
