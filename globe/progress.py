"""What a compression tells those who watch it: a terminal, a log, a tracker."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from globe.plan import BankPlan, Scope, compact
from globe.terminal import Terminal
from globe.train.result import StepRecord


class Observer(Protocol):
    """In this order: note…, prepare…, start, then for each bank step…, bank; scope after its banks; stop at the end or
    on a fault."""

    def prepare(self, task: str) -> None:
        """What is done now, before the first bank; none where an earlier run has prepared."""
        ...

    def note(self, text: str) -> None:
        """Something to know that changes nothing, before any work."""
        ...

    def start(self, scopes: Sequence[Scope], num_finished: int) -> None:
        """The plan is made; the first `num_finished` scopes were finished by an earlier run."""
        ...

    def step(self, bank: BankPlan, record: StepRecord) -> None: ...

    def bank(self, bank: BankPlan, error: float, seconds: float) -> None:
        """A bank is fitted and rounded; `error` is the relative error as stored."""
        ...

    def scope(self, scope: Scope) -> None:
        """A scope's factors are on disk."""
        ...

    def stop(self) -> None: ...


class Observers:
    """Several observers as one."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = tuple(observers)

    def prepare(self, task: str) -> None:
        for observer in self._observers:
            observer.prepare(task)

    def note(self, text: str) -> None:
        for observer in self._observers:
            observer.note(text)

    def start(self, scopes: Sequence[Scope], num_finished: int) -> None:
        for observer in self._observers:
            observer.start(scopes, num_finished)

    def step(self, bank: BankPlan, record: StepRecord) -> None:
        for observer in self._observers:
            observer.step(bank, record)

    def bank(self, bank: BankPlan, error: float, seconds: float) -> None:
        for observer in self._observers:
            observer.bank(bank, error, seconds)

    def scope(self, scope: Scope) -> None:
        for observer in self._observers:
            observer.scope(scope)

    def stop(self) -> None:
        for observer in self._observers:
            observer.stop()


def describe(bank: BankPlan) -> str:
    noun = "layer" if len(bank.layers) == 1 else "layers"
    return f"{noun} {compact(bank.layers)} {'+'.join(bank.families)}"


class _Pace:
    """Matrices fitted so far, and the time that the rest will take at this rate."""

    def __init__(self, scopes: Sequence[Scope], num_finished: int) -> None:
        self.total = sum(bank.num_matrices for scope in scopes[num_finished:] for bank in scope.banks)
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


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class LiveProgress:
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

    def prepare(self, task: str) -> None:
        if self._preparing is None:
            self._preparing = self._progress.add_task(task, total=None, state="")
            self._progress.start()
        self._progress.update(self._preparing, description=task)

    def note(self, text: str) -> None:
        self._progress.console.print(f"note: {text}", style="yellow", soft_wrap=True)

    def start(self, scopes: Sequence[Scope], num_finished: int) -> None:
        if self._preparing is not None:
            self._progress.remove_task(self._preparing)
        self._pace = _Pace(scopes, num_finished)
        self._scopes: TaskID = self._progress.add_task("scopes", total=len(scopes), completed=num_finished, state="")
        self._fit: TaskID = self._progress.add_task("starting", total=self._max_steps, state="")
        self._progress.start()

    def step(self, bank: BankPlan, record: StepRecord) -> None:
        part = bank.num_matrices * record.step / self._max_steps
        self._progress.update(
            self._fit, description=describe(bank), completed=record.step, state=f"error {record.error:.4f}"
        )
        self._progress.update(
            self._scopes, state=f"{self._pace.rate(part):.1f} matrices/s, {self._pace.left(part)} left"
        )

    def bank(self, bank: BankPlan, error: float, seconds: float) -> None:
        self._pace.done += bank.num_matrices
        self._progress.console.print(
            f"{describe(bank)}: error {error:.4f}  rank {bank.rank}, {bank.num_bases} bases  {seconds:.1f} s"
        )

    def scope(self, scope: Scope) -> None:
        self._progress.advance(self._scopes)

    def stop(self) -> None:
        self._progress.stop()


class PlainProgress:
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

    def step(self, bank: BankPlan, record: StepRecord) -> None:
        pass

    def bank(self, bank: BankPlan, error: float, seconds: float) -> None:
        self._pace.done += bank.num_matrices
        self._console.print(
            f"{describe(bank)}: error {error:.4f}  rank {bank.rank}, {bank.num_bases} bases  {seconds:.1f} s, "
            f"{self._pace.rate():.1f} matrices/s, {self._pace.left()} left",
            soft_wrap=True,
        )

    def scope(self, scope: Scope) -> None:
        pass

    def stop(self) -> None:
        pass
