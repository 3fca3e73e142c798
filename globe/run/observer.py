"""What a compression tells those who watch it: a terminal, a log, a tracker."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from globe.checkpoint.report import CodedReport
from globe.plan.scopes import BankPlan, Scope, compact

if TYPE_CHECKING:
    from globe.train.result import StepRecord

_LOGGER = logging.getLogger("globe")
_LOGGER.addHandler(logging.NullHandler())


class Observer:
    """Told, in this order: note…, prepare…, start, then for each bank step…, bank, or for each layer coded; scope after
    them; stop at the end or on a fault. Scopes that several processes work on mingle. Does nothing itself: override
    what you care for."""

    def prepare(self, task: str) -> None:
        """What is done now, before the first bank; none where an earlier run has prepared."""

    def note(self, text: str) -> None:
        """Something to know that changes nothing, before any work."""

    def start(self, scopes: Sequence[Scope], num_finished: int) -> None:
        """The plan is made; the first `num_finished` scopes were finished by an earlier run."""

    def step(self, bank: BankPlan, record: StepRecord) -> None:
        """A step of a bank's fit."""

    def bank(self, bank: BankPlan, error: float, seconds: float) -> None:
        """A bank is fitted and rounded; `error` is the relative error as stored."""

    def coded(self, families: Sequence[CodedReport]) -> None:
        """The families of a layer are coded."""

    def scope(self, scope: Scope) -> None:
        """What is stored of a scope is on disk."""

    def stop(self) -> None:
        """Nothing more follows."""


class Logged(Observer):
    """Tells the logger `globe`, which is silent unless the caller configures it."""

    def prepare(self, task: str) -> None:
        _LOGGER.info("%s", task)

    def note(self, text: str) -> None:
        _LOGGER.warning("%s", text)

    def bank(self, bank: BankPlan, error: float, seconds: float) -> None:
        _LOGGER.info("%s", describe_fitted(bank, error, seconds))

    def coded(self, families: Sequence[CodedReport]) -> None:
        _LOGGER.info("%s", describe_coded(families))


class Observers(Observer):
    """Several observers as one, the logger among them."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = (Logged(), *observers)

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

    def coded(self, families: Sequence[CodedReport]) -> None:
        for observer in self._observers:
            observer.coded(families)

    def scope(self, scope: Scope) -> None:
        for observer in self._observers:
            observer.scope(scope)

    def stop(self) -> None:
        for observer in self._observers:
            observer.stop()


class Told(Observer):
    """Passes what is told of a scope on to a function, as the name of the method and its arguments."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell

    def prepare(self, task: str) -> None:
        self._tell("prepare", task)

    def step(self, bank: BankPlan, record: StepRecord) -> None:
        self._tell("step", bank, record)

    def bank(self, bank: BankPlan, error: float, seconds: float) -> None:
        self._tell("bank", bank, error, seconds)

    def coded(self, families: Sequence[CodedReport]) -> None:
        self._tell("coded", families)

    def scope(self, scope: Scope) -> None:
        self._tell("scope", scope)


class ServingBank(Protocol):
    """A bank as it is planned, stored or reported."""

    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def families(self) -> Sequence[str]: ...


def describe(bank: ServingBank) -> str:
    """Whom a bank serves."""
    noun = "layer" if len(bank.layers) == 1 else "layers"
    return f"{noun} {compact(bank.layers)} {'+'.join(bank.families)}"


def describe_fitted(bank: BankPlan, error: float, seconds: float) -> str:
    """A fitted bank in one line."""
    shape = f"rank {bank.shape.rank}, {bank.shape.num_bases} bases"
    return f"{describe(bank)}: relative error {error:.4f}  {shape}  {seconds:.1f} s"


def describe_coded(families: Sequence[CodedReport]) -> str:
    """A coded layer in one line."""
    bits = 8 * sum(part.stored_bytes for part in families) / sum(part.original_parameters for part in families)
    error = math.hypot(*(part.error for part in families)) / math.sqrt(len(families))
    seconds = sum(part.seconds for part in families)
    return f"layer {families[0].layer}: {bits:.2f} bits, relative error {error:.4f}  {seconds:.1f} s"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
