"""Fitting a bank to experts that are read again on every pass, a part of them at a time.

Memory holds four tensors of the bank's size (the bank, its first moments, its gradient, the best one), the codes and
one part: it does not grow with the number of parts. The warm start is the streamed alignment; then it is the loop of a
fit in memory, a pass to a step. Adapters are exact on each visit and not kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from globe.bank.factors import Factors
from globe.bank.objective import Problem
from globe.init.streamed_alignment import align_pass, sketch
from globe.init.warm_start import START_DEVIATION, deviation
from globe.machine.device import usable_device
from globe.train.config import FitConfig
from globe.train.fit_banks import Best, Progress, Projected, lift_faint, run, stats_of
from globe.train.parts import ExpertParts
from globe.train.result import FitResult, StepRecord
from globe.train.schedule import first_schedule

State = dict[str, Tensor]
"""All that the next pass depends on."""


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

    A pass is one step of `fit_bank`. The factors returned come without adapters, (0, P, R).

    `save` is given the state after every pass; from such a `state` the fit goes on to the same result. Experts that are
    all zero get factors that are: outcome `zero`. Raises `SettingsError` for settings other than varpro with signed
    codes, no support and the procrustes warm start, and `GlobeError` for experts that are not finite.
    """
    config.check_streamed()
    config.check_shape(sum(parts.sizes), parts.rows, parts.columns)
    device, save, on_step = usable_device(config.device), save or _ignore, on_step or _ignore
    parts = dataclasses.replace(parts, read=_Reader(parts, config, device))
    now: State = {name: value.to(device, copy=True) for name, value in (state or {}).items()}
    if "energy" not in now:
        bases, energy = sketch(
            lambda index: parts.read(index).weights, parts.slices(), config.rank, config.num_bases, config.seed
        )
        now = {"bases": bases, "energy": bases.new_tensor(energy, dtype=torch.float64)}
    if float(now["energy"]) == 0:
        result = FitResult.of_zeros(_zero_factors(parts, now["bases"], config), config.temperature)
        on_step(result.steps[0])
        return result
    _align(parts, config, now, save)
    quality = {"alignment_error": float(now["alignment"][-1])}
    solver = Projected(parts, now["codes"], now["bases"], config, float(now["energy"]))
    progress = Progress(Best(solver.codes.clone(), solver.bases.clone()), first_schedule(config))
    if "records" in now:
        _resume(solver, progress, now)
    fixed = {"energy": now["energy"], "alignment": now["alignment"]}
    outcome = run(solver, progress, config, on_step, lambda: save({**fixed, **_state(solver, progress)}))
    best = progress.best
    adapters = best.bases.new_empty(0, parts.rows, config.rank)
    factors = Factors(adapters, best.codes, best.bases, config.activation)
    return FitResult(factors, outcome, tuple(progress.records), stats_of(progress, quality))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A part's problem on the device and in the precision of the fit, its faint experts lifted."""

    parts: ExpertParts
    config: FitConfig
    device: str

    def __call__(self, index: int) -> Problem:
        problem = self.parts.read(index)
        weights, _ = lift_faint(problem.weights.to(self.device, self.config.torch_dtype))
        metric = problem.metric and problem.metric.to(weights)
        return dataclasses.replace(problem, weights=weights, metric=metric, lambda_a=self.config.lambda_a)


def _align(parts: ExpertParts, config: FitConfig, now: State, save: Callable[[State], None]) -> None:
    """The passes of the warm start that are left, then mixtures of unit deviation; moves `now`."""
    while "records" not in now and len(now.get("alignment", ())) < config.align_steps:
        codes, bases = now.get("codes"), now.pop("bases")
        codes, bases, missed = align_pass(
            lambda index: parts.read(index).weights, parts.slices(), config.rank, codes, bases
        )
        errors = [*now.get("alignment", ()), math.sqrt(missed / float(now["energy"]))]
        now |= {"codes": codes, "bases": bases, "alignment": torch.tensor(errors, dtype=torch.float64)}
        save(now)
    if "records" not in now:
        scale = deviation(now["codes"], now["bases"]) / START_DEVIATION
        now["bases"].div_(max(scale, torch.finfo(now["bases"].dtype).tiny))
        now["energy"] = now["bases"].new_tensor(parts.energy(), dtype=torch.float64)  # in the metric from here on


def _state(solver: Projected, progress: Progress) -> State:
    rows = [list(dataclasses.astuple(record)) for record in progress.records]
    counts = [progress.num_eligible, progress.num_fallbacks, progress.num_restarts]
    return {
        **solver.projection.state(),
        "best.codes": progress.best.codes,
        "best.bases": progress.best.bases,
        "best.objective": torch.tensor(progress.best.objective, dtype=torch.float64),
        "records": torch.tensor(rows, dtype=torch.float64).view(-1, 9),
        "counts": torch.tensor(counts),
    }


def _resume(solver: Projected, progress: Progress, state: State) -> None:
    solver.projection.resume(state)
    progress.best = Best(state["best.codes"], state["best.bases"], float(state["best.objective"]))
    progress.records = [StepRecord(int(row[0]), *map(float, row[1:])) for row in state["records"]]
    counts = [int(count) for count in state["counts"]]
    progress.num_eligible, progress.num_fallbacks, progress.num_restarts = counts
    solver.shrink = 0.5**progress.num_restarts
    solver.resume(len(progress.records), progress.schedule)


def _zero_factors(parts: ExpertParts, bases: Tensor, config: FitConfig) -> Factors:
    count = sum(parts.sizes)
    return Factors(
        bases.new_empty(0, parts.rows, bases.shape[1]),
        bases.new_zeros(count, len(bases)),
        torch.zeros_like(bases),
        config.activation,
    )


def _ignore(_: object) -> None:
    pass
