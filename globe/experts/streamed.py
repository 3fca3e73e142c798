"""A bank fitted to a checkpoint's experts without ever holding more than one layer of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from globe.bank.factors import Factors
from globe.bank.objective import Problem
from globe.checkpoint.kept import keep_tensors, kept_tensors
from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint
from globe.experts.metric import LayerStatistics
from globe.experts.stack import ExpertStack, read_stack
from globe.experts.storage import StoredFactors, to_storage
from globe.plan.scopes import BankPlan
from globe.train.config import FitConfig
from globe.train.parts import ExpertParts
from globe.train.result import FitResult, StepRecord
from globe.train.stream import State, fit_parts

SAVE_SECONDS = 300.0
"""Between two saves of the state of a fit, at least."""


@dataclasses.dataclass(frozen=True)
class StreamedExperts:
    """The experts of a bank, one layer of them at a time."""

    checkpoint: Checkpoint
    layers: Mapping[int, ExpertLayer]
    bank: BankPlan
    statistics: Mapping[int, LayerStatistics] | None
    """Of the layers, when calibrated."""

    def parts(self) -> ExpertParts:
        sizes = [self.layers[index].num_experts * len(self.bank.families) for index in self.bank.layers]
        return ExpertParts(sizes, self.bank.shape.rows, self.bank.shape.columns, self._problem)

    def _problem(self, number: int) -> Problem:
        stack = self.stack(number)
        return Problem(stack.weights, metric=stack.metric)

    def stack(self, number: int) -> ExpertStack:
        """The experts of the bank's `number`-th layer."""
        index = self.bank.layers[number]
        size = self.layers[index].num_experts * len(self.bank.families)
        shape = dataclasses.replace(self.bank.shape, num_matrices=size)
        bank = dataclasses.replace(self.bank, layers=(index,), shape=shape)
        return read_stack(self.checkpoint, self.layers, bank, self.statistics)

    def fit(self, config: FitConfig, on_step: Callable[[StepRecord], None], state: Path) -> FitResult:
        """Codes and bases. The fit's state is saved in the file `state` every five minutes, between passes, and taken
        up from there."""
        saved = time.monotonic()

        def save(now: State) -> None:
            nonlocal saved
            if time.monotonic() - saved >= SAVE_SECONDS:
                keep_tensors(state, now)
                saved = time.monotonic()

        return fit_parts(self.parts(), config, on_step, state=kept_tensors(state), save=save)

    def store(self, factors: Factors, dtype: torch.dtype) -> Iterator[StoredFactors]:
        """Layer after layer, exact adapters to the rounded codes and bases."""
        for number, place in enumerate(self.parts().slices()):
            own = dataclasses.replace(factors, codes=factors.codes[place])
            yield to_storage(self.stack(number), own, dtype)
