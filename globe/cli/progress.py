"""What a compression tells those who watch it: a terminal, a log, a tracker."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from globe.checkpoint.report import CodedReport
from globe.plan.scopes import BankPlan, Scope
from globe.run.observer import Observer, clock, describe, describe_coded, describe_fitted
from globe.terminal import Terminal
from globe.train.result import StepRecord


class _Pace:
    """Matrices fitted so far, or layers coded, and the time that the rest will take at this rate."""

    def __init__(self, scopes: Sequence[Scope], num_finished: int) -> None:
        matrices = sum(bank.shape.num_matrices for scope in scopes[num_finished:] for bank in scope.banks)
        self.total = matrices or len(scopes) - num_finished
        self.done = 0
        self._began = time.monotonic()

    def rate(self, part: float = 0.0) -> float:
        """Matrices a second."""
        return (self.done + part) / max(time.monotonic() - self._began, 1e-9)

    def left(self, part: float = 0.0) -> str:
        rate = self.rate(part)
        if rate < 1e-6 or self.done + part <= 0:
            return "?"
        return clock((self.total - self.done - part) / rate)


class LiveProgress(Observer):
    """A live display: the present bank, its error, throughput and the time left."""

    def __init__(self, console: Terminal, max_steps: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            console=console,
        )
        self._max_steps = max_steps
        self._preparing: TaskID | None = None
        self._shown: list[TaskID] = []

    def prepare(self, task: str) -> None:
        if self._preparing is None:
            self._preparing = self._progress.add_task(task, total=None, state="")
            self._progress.start()
        self._progress.update(self._preparing, description=task)

    def note(self, text: str) -> None:
        self._progress.console.print(f"note: {text}", style="yellow", soft_wrap=True)

    def start(self, scopes: Sequence[Scope], num_finished: int) -> None:
        for task in (*self._shown, *([] if self._preparing is None else [self._preparing])):
            self._progress.remove_task(task)
        self._preparing, self._shown = None, []
        self._pace = _Pace(scopes, num_finished)
        self._scopes: TaskID = self._progress.add_task("scopes", total=len(scopes), completed=num_finished, state="")
        if scopes[0].banks:
            self._fit: TaskID = self._progress.add_task("starting", total=self._max_steps, state="")
            self._shown.append(self._fit)
        self._shown.append(self._scopes)
        self._progress.start()

    def step(self, bank: BankPlan, record: StepRecord) -> None:
        part = bank.shape.num_matrices * record.step / self._max_steps
        self._progress.update(
            self._fit, description=describe(bank), completed=record.step, state=f"objective {record.error:.4f}"
        )
        self._progress.update(
            self._scopes, state=f"{self._pace.rate(part):.1f} matrices/s, {self._pace.left(part)} left"
        )

    def bank(self, bank: BankPlan, error: float, seconds: float) -> None:
        self._pace.done += bank.shape.num_matrices
        self._progress.console.print(describe_fitted(bank, error, seconds))

    def coded(self, families: Sequence[CodedReport]) -> None:
        self._pace.done += 1
        self._progress.console.print(describe_coded(families))
        self._progress.update(self._scopes, state=f"{self._pace.left()} left")

    def scope(self, scope: Scope) -> None:
        self._progress.advance(self._scopes)

    def stop(self) -> None:
        self._progress.stop()


class PlainProgress(Observer):
    """One line for each bank, for logs and pipes."""

    def __init__(self, console: Terminal) -> None:
        self._console = console

    def prepare(self, task: str) -> None:
        self._console.print(task)

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}", style="yellow", soft_wrap=True)

    def start(self, scopes: Sequence[Scope], num_finished: int) -> None:
        self._pace = _Pace(scopes, num_finished)
        if num_finished:
            self._console.print(f"going on after {num_finished} of {len(scopes)} scopes")

    def bank(self, bank: BankPlan, error: float, seconds: float) -> None:
        self._pace.done += bank.shape.num_matrices
        self._console.print(
            f"{describe_fitted(bank, error, seconds)}, {self._pace.rate():.1f} matrices/s, {self._pace.left()} left",
            soft_wrap=True,
        )

    def coded(self, families: Sequence[CodedReport]) -> None:
        self._pace.done += 1
        self._console.print(f"{describe_coded(families)}, {self._pace.left()} left", soft_wrap=True)
