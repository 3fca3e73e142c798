"""Fitting a bank to experts that are read again on every pass, a part of them at a time.

Memory holds the bank, its gradient and moments, the codes and one part: it does not grow with the number of parts.
The codes of a part move while it is there, the bank at the end of the pass by the gradient of all parts: the steps are
those of a fit in memory. Adapters are exact on each visit and not kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from globe.bank.codes import entropy, popularity, support
from globe.bank.factors import Factors
from globe.bank.objective import Problem, project
from globe.errors import GlobeError
from globe.init.streamed_alignment import align_pass, sketch
from globe.init.warm_start import START_DEVIATION, deviation
from globe.machine.device import usable_device
from globe.train.config import FitConfig
from globe.train.fit_banks import ROUND_FROM, lift_faint, step_length
from globe.train.result import FitResult, StepRecord
from globe.train.varpro import Accelerated, rounded_bank, spread

State = dict[str, Tensor]
"""All that the next pass depends on."""


@dataclasses.dataclass(frozen=True)
class ExpertParts:
    """Experts that are read part by part."""

    sizes: Sequence[int]
    """Experts in each part."""
    rows: int
    """P."""
    columns: int
    """D."""
    read: Callable[[int], Problem]
    """A part's experts, near a standard deviation of 1, and their metric."""

    def slices(self) -> list[slice]:
        """Each part's place along E."""
        ends = [sum(self.sizes[: count + 1]) for count in range(len(self.sizes))]
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]


@torch.no_grad()
def fit_parts(
    parts: ExpertParts,
    config: FitConfig,
    on_step: Callable[[StepRecord], None] | None = None,
    *,
    state: State | None = None,
    save: Callable[[State], None] | None = None,
) -> FitResult:
    """`fit_bank` for experts in parts: `align_steps` passes of the streamed alignment, then `max_steps` of varpro.

    A pass is one step of `fit_bank`. The last factors are returned, for the step falls to nothing along its cosine, and
    without adapters, (0, P, R). The record of a pass tells the error of the factors that it begins with, that of the
    last pass, which moves nothing, the error of those returned.

    `save` is given the state after every pass; from such a `state` the fit goes on to the same result. Experts that are
    all zero get factors that are: outcome `zero`. Raises `SettingsError` for settings other than varpro with signed
    codes, no support and the procrustes warm start, and `GlobeError` for experts that are not finite and for a fit that
    diverges.
    """
    config.check_streamed()
    config.check_shape(sum(parts.sizes), parts.rows, parts.columns)
    stream = _Stream(parts, config, state or {})
    if stream.begin() == 0:
        result = FitResult.of_zeros(stream.zero_factors(), config.temperature, num_fallbacks=0)
        if on_step:
            on_step(result.steps[0])
        return result
    stream.align(save)
    for number in range(stream.num_passes + 1, config.max_steps + 2):
        stream.fit(number, move=number <= config.max_steps)
        if on_step:
            on_step(stream.records[-1])
        if save:
            save(stream.state())
    return stream.result()


class _Stream:
    """A fit between two passes: its state, and the passes."""

    def __init__(self, parts: ExpertParts, config: FitConfig, state: State) -> None:
        self._parts, self._config, self._slices = parts, config, parts.slices()
        self._device = usable_device(config.device)
        self._tensors: State = {name: value.to(self._device, copy=True) for name, value in state.items()}
        self.records = [
            StepRecord(int(row[0]), *map(float, row[1:])) for row in self._tensors.pop("records", torch.empty(0, 9))
        ]

    @property
    def num_passes(self) -> int:
        return len(self.records)

    def state(self) -> State:
        rows = [list(dataclasses.astuple(record)) for record in self.records]
        return {**self._tensors, "records": torch.tensor(rows, dtype=torch.float64).view(-1, 9)}

    def _read(self, index: int) -> Problem:
        found = self._parts.read(index)
        weights = found.weights.to(self._device, self._config.torch_dtype)
        weights, _ = lift_faint(weights)
        metric = found.metric and found.metric.to(weights)
        return dataclasses.replace(found, weights=weights, metric=metric, lambda_a=self._config.lambda_a)

    def _weights(self, index: int) -> Tensor:
        return self._read(index).weights

    def begin(self) -> float:
        """The first pass, unless it was made: a bank to begin from. Returns the experts' energy."""
        config, now = self._config, self._tensors
        if "energy" not in now:
            bases, energy = sketch(self._weights, self._slices, config.rank, config.num_bases, config.seed)
            now |= {"bases": bases, "energy": bases.new_tensor(energy, dtype=torch.float64)}
        return float(now["energy"])

    def zero_factors(self) -> Factors:
        bases, count = torch.zeros_like(self._tensors["bases"]), self._slices[-1].stop
        adapters = bases.new_empty(0, self._parts.rows, bases.shape[1])
        return Factors(adapters, bases.new_zeros(count, len(bases)), bases, self._config.activation)

    def align(self, save: Callable[[State], None] | None) -> None:
        """The passes of the warm start that are left, then unit mixtures and moments at rest."""
        config, now = self._config, self._tensors
        while "spread" not in now and len(now.get("alignment", ())) < config.align_steps:
            codes, bases = now.get("codes"), now.pop("bases")
            codes, bases, missed = align_pass(self._weights, self._slices, config.rank, codes, bases)
            errors = [*now.get("alignment", ()), math.sqrt(missed / float(now["energy"]))]
            now |= {"codes": codes, "bases": bases, "alignment": torch.tensor(errors, dtype=torch.float64)}
            if save:
                save(self.state())
        if "spread" not in now:
            scale = deviation(now["codes"], now["bases"]) / START_DEVIATION
            now["bases"].div_(max(scale, torch.finfo(now["bases"].dtype).tiny))
            energies = [float(self._read(index).energy()) for index in range(len(self._slices))]
            now["energy"] = now["bases"].new_tensor(sum(energies))
            now["spread"] = now["bases"].new_tensor([spread(now["codes"]), spread(now["bases"])])
            now |= {"codes.first": torch.zeros_like(now["codes"]), "codes.second": torch.zeros_like(now["codes"])}
            now |= {"bases.first": torch.zeros_like(now["bases"]), "bases.second": now["bases"].new_zeros(0)}

    def fit(self, number: int, *, move: bool) -> None:
        """Pass `number`, counted from 1: over all parts once."""
        config, now = self._config, self._tensors
        scale = config.learning_rate * now["spread"]
        length = step_length(number, config.max_steps) if move else 0.0
        bank = Accelerated(now["bases"], float(scale[1]))
        if number > 1:
            bank.first, bank.second, bank.count = now["bases.first"], now["bases.second"], number - 1
        bases = rounded_bank(bank.value, config.bank_bits if number >= ROUND_FROM * config.max_steps else None)
        gradient = torch.zeros_like(bases) if move else None
        total = 0.0
        num_fallbacks = 0
        for index, own in enumerate(self._slices):
            codes = Accelerated(now["codes"][own], float(scale[0]))
            found = project(
                self._read(index),
                codes.value,
                bases,
                config.activation,
                energy=now["energy"],
                gradient=move,
                grad_bases=gradient,
            )
            total += found.objective
            num_fallbacks += found.num_fallbacks
            if found.grad_codes is not None:
                codes.first, codes.second = now["codes.first"][own], now["codes.second"][own]
                codes.count = number - 1
                codes.step(found.grad_codes, length)
        del bases
        if gradient is not None:
            bank.step(gradient, length)
        if not math.isfinite(total):
            raise GlobeError(
                f"the streamed fit diverged on pass {number}: lower learning_rate ({config.learning_rate:g})"
            )
        now |= {"bases.first": bank.first, "bases.second": bank.second}
        now["fallbacks"] = now.get("fallbacks", torch.zeros((), dtype=torch.int64)) + num_fallbacks
        error, mixed = math.sqrt(total), now["codes"]
        support_, entropy_ = float(support(mixed).double().median()), float(entropy(mixed).mean())
        self.records.append(StepRecord(number, error, error, 1.0, 1.0, config.temperature, support_, entropy_, length))

    def result(self) -> FitResult:
        config, now = self._config, self._tensors
        adapters = now["bases"].new_empty(0, self._parts.rows, config.rank)
        metrics: dict[str, Any] = {
            "trajectory": [record.raw_error for record in self.records],
            "warm_start": {"alignment_error": float(now["alignment"][-1])},
            "popularity": [float(share) for share in popularity(now["codes"])],
            "num_fallbacks": int(now["fallbacks"]),
        }
        factors = Factors(adapters, now["codes"], now["bases"], config.activation)
        return FitResult(factors, "max_steps", tuple(self.records), metrics)
