"""Experiment trackers as observers of a compression; each package is imported only when it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from globe.errors import SettingsError
from globe.plan.scopes import BankPlan
from globe.plan.settings import CompressConfig
from globe.run.observer import Observer, describe
from globe.terms import Track
from globe.train.result import StepRecord

Log = Callable[[Mapping[str, float], int], None]


class Tracker(Observer):
    """Logs every step's record and every bank's error; the steps of all banks are counted through."""

    def __init__(self, log: Log, close: Callable[[], None]) -> None:
        self._log, self._close, self._count = log, close, 0

    def step(self, bank: BankPlan, record: StepRecord) -> None:
        values = {f"{describe(bank)}/{name}": float(value) for name, value in dataclasses.asdict(record).items()}
        self._log(values, self._count)
        self._count += 1

    def bank(self, bank: BankPlan, error: float, seconds: float) -> None:
        self._log({"error": error, "seconds": seconds}, self._count)

    def stop(self) -> None:
        self._close()


def make_tracker(track: Track, config: CompressConfig, folder: Path) -> Tracker:
    """A tracker of the named kind; offline modes are the trackers' own (`WANDB_MODE=offline`).

    Raises `SettingsError` with the command to install it when the package is missing.
    """
    module: Any = _package({"tensorboard": "torch.utils.tensorboard"}.get(track, track), track)
    if track == "tensorboard":
        writer = module.SummaryWriter(str(folder))

        def log(values: Mapping[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return Tracker(log, writer.close)
    module.init(project="globe", config=dataclasses.asdict(config))
    return Tracker(lambda values, step: module.log(dict(values), step=step), module.finish)


def _package(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise SettingsError(f"--track {extra} needs a package: pip install {extra}") from error
