"""Fitting a bank: acceptance and stopping, in one loop for both solvers and for streams.

Decided here is the size of a step and its backtracking, when to stop and which factors to keep; what else changes from
step to step follows the schedule (`globe.train.schedule`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from globe.bank.codes import entropy, popularity, spread_codes, support
from globe.bank.factors import Factors
from globe.bank.linalg import norms
from globe.bank.objective import InputMetric, Problem, expert_chunks, objective, project
from globe.errors import GlobeError, SettingsError
from globe.init.init_bank import AMStep, BankUpdate, am_step
from globe.init.warm_start import WarmStart, warm_start
from globe.machine.device import usable_device
from globe.train.config import FitConfig
from globe.train.parts import ExpertParts
from globe.train.result import FitResult, FitStats, Outcome, StepRecord
from globe.train.schedule import Schedule, first_schedule, last_schedule, next_schedule, step_length
from globe.train.varpro import VariableProjection

SAFE_DEVIATION = (1e-4, 1e4)
"""Experts whose standard deviation lies between these are fitted as they are, others divided by it: their squares would
leave the range of float32."""
FAINT = 1e-6
"""Experts whose root mean square is a smaller share of all experts' are fitted as if it were this one, their adapters
made smaller then: to the objective they are nothing, but the squares of their features would leave float32's range."""
BACKTRACKS = (1.0, 0.5, 0.25)
SLOW = 0.99
MAX_REJECTED = 5


@dataclasses.dataclass
class Best:
    """The best feasible factors so far, a copy of its own; `objective` is f at λ = 1 and never rises."""

    codes: Tensor
    bases: Tensor
    objective: float = math.inf

    def offer(self, objective: float, codes: Tensor, bases: Tensor) -> None:
        if objective < self.objective:
            self.objective = objective
            self.codes.copy_(codes)
            self.bases.copy_(bases)


@dataclasses.dataclass(frozen=True)
class Iterate:
    """Where a solver is, and how it came there."""

    objective: float
    """f at λ = 1: what the best is chosen by."""
    raw: float
    """f under the step's own λ."""
    schedule: Schedule
    """What the step was taken under."""
    step_size: float = 0.0
    """Share of the full step; 0 where none was accepted."""
    accepted: bool = True
    median_support: float | None = None
    """What steers the temperature, where that is not the iterate's own support."""
    num_fallbacks: int = 0


class Solver(Protocol):
    """An algorithm that `run` moves: it starts at a warm start and knows nothing of best factors, records and ends."""

    @property
    def codes(self) -> Tensor: ...
    @property
    def bases(self) -> Tensor: ...

    def evaluate(self) -> Iterate:
        """Where the solver is."""
        ...

    def move(self, step: int, schedule: Schedule) -> None:
        """Take step `step`, counted from 1; what it evaluates to may be NaN."""
        ...

    def fall_back(self, best: Best, now: Iterate, num_eligible: int) -> bool:
        """Return to the best factors if the iterate has strayed too far from them; whether it did."""
        ...

    def settled(self, records: Sequence[StepRecord], num_eligible: int) -> Outcome | None:
        """Why no further step is worth taking, when the last `num_eligible` could lower the error; None if one is."""
        ...


@dataclasses.dataclass
class Progress:
    """A run between two steps, all of it."""

    best: Best
    schedule: Schedule
    records: list[StepRecord] = dataclasses.field(default_factory=list[StepRecord])
    num_eligible: int = 0
    """Steps so far that could lower the error."""
    num_fallbacks: int = 0
    num_restarts: int = 0
    num_rejected: int = 0


def run(
    solver: Solver,
    progress: Progress,
    config: FitConfig,
    on_step: Callable[[StepRecord], None],
    save: Callable[[], None] = lambda: None,
) -> Outcome:
    """The loop of every fit: evaluate, keep the best, record, decide, move. Returns why it ended.

    Step 0 is the warm start. `progress` is where the run begins, and is moved; `save` is called after every move.
    """
    best = progress.best
    for step in range(len(progress.records), config.max_steps + 1):
        now = solver.evaluate()
        if not math.isfinite(now.objective) and step > 0:
            return "non_finite"
        progress.num_fallbacks += now.num_fallbacks
        progress.num_rejected += not now.accepted
        if step == 0:
            best.offer(now.objective, solver.codes, solver.bases)
        elif _feasible(solver.codes, config):
            progress.num_eligible += now.schedule == last_schedule(now.schedule)
            best.offer(now.objective, solver.codes, solver.bases)
        progress.records.append(_record(step, best, now, solver.codes))
        on_step(progress.records[-1])
        if not math.isfinite(now.objective):
            return "non_finite"
        if step > 0:
            median = progress.records[-1].median_support if now.median_support is None else now.median_support
            progress.schedule = next_schedule(now.schedule, step, now.accepted, median, config)
            progress.num_restarts += solver.fall_back(best, now, progress.num_eligible)
            if outcome := solver.settled(progress.records, progress.num_eligible):
                return outcome
        if step < config.max_steps:
            solver.move(step + 1, progress.schedule)
            save()
    return "max_steps"


@torch.no_grad()
def fit_bank(
    experts: Tensor,
    config: FitConfig,
    on_step: Callable[[StepRecord], None] | None = None,
    *,
    metric: InputMetric | None = None,
) -> FitResult:
    """Fit What_e = A_e φ(Σ_j a_ej B_j) to `experts` (E, P, D): minimise ‖(W − What) C^{1/2}‖²_F / ‖W C^{1/2}‖²_F.

    C is each expert's in `metric`, by default the identity. `on_step` sees every record as it is made. The factors
    returned are in the units and on the device of `experts`, in the precision of the fit; their error is the last entry
    of `history`, which never rises. The same input and settings give the same bytes on the same machine.
    Experts that are all zero get factors that are: outcome `zero`. `experts` are neither changed nor, where they are on
    the fit's device in its precision, copied; varpro keeps four tensors of the bank's size beside them. Raises
    `SettingsError` for settings that do not fit the shape or a device that is not here, and `GlobeError` for experts
    that are not finite.
    """
    if experts.dim() != 3:
        raise SettingsError(f"experts must be (E, P, D); found shape {tuple(experts.shape)}")
    config.check_shape(*experts.shape)
    weights = experts.detach().to(usable_device(config.device), config.torch_dtype)
    sigma = _root_mean_square(weights)
    if sigma == 0:
        result = FitResult.of_zeros(_zero_factors(experts, config), config.temperature)
        (on_step or _ignore)(result.steps[0])
        return result
    if not SAFE_DEVIATION[0] < sigma < SAFE_DEVIATION[1]:
        weights = weights / sigma
    else:
        sigma = torch.ones_like(sigma)
    weights, back = lift_faint(weights)
    problem = Problem(weights, metric=metric and metric.to(weights), lambda_a=config.lambda_a)
    start = warm_start(
        problem.weights,
        config.rank,
        config.num_bases,
        config.warm_start,
        codes=config.codes,
        support=config.support,
        align_steps=config.align_steps,
        seed=config.seed,
    )
    solver = _solver(problem, start, config)
    progress = Progress(Best(solver.codes.clone(), solver.bases.clone()), first_schedule(config))
    quality = start.metrics
    del start
    outcome = run(solver, progress, config, on_step or _ignore)
    del solver
    best = progress.best
    final = project(problem, best.codes, best.bases, config.activation, adapters=True)
    assert final.adapters is not None
    factors = Factors(
        final.adapters.mul_(sigma * back).to(experts.device),
        best.codes.to(experts.device),
        best.bases.to(experts.device),
        config.activation,
    )
    return FitResult(factors, outcome, tuple(progress.records), stats_of(progress, quality))


def stats_of(progress: Progress, warm_start: Mapping[str, float]) -> FitStats:
    """What a run tells beside its records."""
    shares = tuple(float(share) for share in popularity(progress.best.codes))
    return FitStats(warm_start, shares, progress.num_fallbacks, progress.num_restarts, progress.num_rejected)


def _zero_factors(experts: Tensor, config: FitConfig) -> Factors:
    num_experts, rows, columns = experts.shape
    like = torch.zeros((), dtype=config.torch_dtype, device=experts.device)
    return Factors(
        like.new_zeros(num_experts, rows, config.rank),
        like.new_zeros(num_experts, config.num_bases),
        like.new_zeros(config.num_bases, config.rank, columns),
        config.activation,
    )


def _root_mean_square(weights: Tensor) -> Tensor:
    """The standard deviation, for a mean near 0; `GlobeError` for weights that are not finite."""
    deviation = (norms(weights).square().mean() / weights[0].numel()).sqrt()
    if SAFE_DEVIATION[0] < deviation < SAFE_DEVIATION[1]:
        return deviation
    low, high = weights.aminmax()  # the squares may have left the range of float32
    peak = torch.maximum(-low, high)
    if not bool(peak.isfinite()):
        raise GlobeError("experts hold NaN or Inf; mend the weights before fitting them")
    if peak == 0:
        return peak
    squares = [norms(weights[part] / peak).square() for part in expert_chunks(weights)]
    return peak * (torch.cat(squares).mean() / weights[0].numel()).sqrt()


def lift_faint(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Experts (E, P, D), in units near 1, with none but zeros that is `FAINT`, and the factors that undo it, (E, 1, 1).

    A copy, unless there is nothing to lift.
    """
    sizes, back = norms(weights), weights.new_ones(len(weights), 1, 1)
    least = FAINT * float(sizes.square().mean().sqrt())
    faint = sizes < least
    faint[faint.clone()] = weights[faint].flatten(1).any(1)
    if not bool(faint.any()):
        return weights, back
    faint_experts = weights[faint].cpu().double()
    shares = (norms(faint_experts) / least)[:, None, None]
    lifted = weights.clone()
    lifted[faint], back[faint] = (faint_experts / shares).to(weights), shares.to(weights)
    return lifted, back


def _ignore(_: StepRecord) -> None:
    pass


def _solver(problem: Problem, start: WarmStart, config: FitConfig) -> Solver:
    """At the warm start, codes on the simplex cut or spread to the support: what a fit must improve on."""
    codes = start.codes
    if config.codes != "ridge" and config.support is not None:
        codes = spread_codes(codes, config.support)
    if config.solver == "am":
        return Alternation(problem, codes, start.bases, start.targets, config)
    return Projected(ExpertParts.in_memory(problem), codes, start.bases, config, float(problem.energy()))


def _feasible(codes: Tensor, config: FitConfig) -> bool:
    """Whether the median support is within 1 of the one asked for; signed codes have theirs by construction."""
    if config.codes == "ridge" or config.support is None:
        return True
    return abs(float(support(codes).double().median()) - config.support) <= 1


def _record(step: int, best: Best, now: Iterate, codes: Tensor) -> StepRecord:
    return StepRecord(
        step,
        best.objective**0.5,
        now.raw**0.5,
        now.schedule.activation_lambda,
        now.schedule.route_beta,
        now.schedule.temperature,
        float(support(codes).double().median()),
        float(entropy(codes).mean()),
        now.step_size,
    )


def _settled(records: Sequence[StepRecord], num_eligible: int, patience: int, config: FitConfig) -> bool:
    """Whether the error has stopped falling over `patience` steps, when the last `num_eligible` could lower it."""
    if num_eligible <= patience:
        return False
    earlier = records[-1 - patience].error
    return earlier - records[-1].error <= config.tolerance * earlier


class Projected:
    """`VariableProjection` as `run` moves it: warm-up, cosine, and returns to the best factors at half the step."""

    def __init__(self, parts: ExpertParts, codes: Tensor, bases: Tensor, config: FitConfig, energy: float) -> None:
        self._config = config
        self._schedule, self._length, self.shrink, self._num_fallbacks = first_schedule(config), 0.0, 1.0, 0
        self.projection = VariableProjection(
            parts,
            codes,
            bases,
            config.activation,
            config.codes,
            config.learning_rate,
            config.temperature,
            energy=energy,
            fixed_support=config.codes == "ridge" and config.support is not None,
        )

    @property
    def codes(self) -> Tensor:
        return self.projection.codes

    @property
    def bases(self) -> Tensor:
        return self.projection.bases

    def evaluate(self) -> Iterate:
        projected = self.projection.evaluate()
        return Iterate(
            projected.objective,
            projected.objective,
            self._schedule,
            self._length,
            num_fallbacks=projected.num_fallbacks,
        )

    def move(self, step: int, schedule: Schedule) -> None:
        self._schedule, self._length = schedule, self.shrink * step_length(step, self._config.max_steps)
        self.projection.move(self._length, schedule.temperature)

    def resume(self, step: int, schedule: Schedule) -> None:
        """Be where the move of step `step` led, its factors and moments being set already."""
        self._schedule, self._length = schedule, self.shrink * step_length(step, self._config.max_steps)

    def fall_back(self, best: Best, now: Iterate, num_eligible: int) -> bool:
        if num_eligible <= self._config.patience or now.objective <= best.objective * (1 + self._config.window) ** 2:
            return False
        self.projection.restart(best.codes, best.bases, now.schedule.temperature)
        self.shrink /= 2
        return True

    def settled(self, records: Sequence[StepRecord], num_eligible: int) -> Outcome | None:
        patience = max(self._config.patience, self._config.max_steps // 4)  # long steps may find nothing for a while
        return "converged" if _settled(records, num_eligible, patience, self._config) else None


def _backtrack(
    problem: Problem,
    adapters: Tensor,
    alpha: Tensor,
    bases: Tensor,
    warm_targets: Tensor,
    schedule: Schedule,
    config: FitConfig,
) -> tuple[AMStep, float, float]:
    """The longest accepted step of the method of optimal directions; where that gains less than 1 %, or nothing, a
    Gauss–Newton update of the bank follows. A step that leaves the support asked for is not accepted. Returns the step,
    its share of the full step, and the median support of the full step where that lowered f, for the temperature.
    """

    def step(adapters: Tensor, alpha: Tensor, bases: Tensor, size: float, bank_update: BankUpdate) -> AMStep:
        tried = am_step(
            problem,
            adapters,
            alpha,
            bases,
            warm_targets,
            activation=config.activation,
            activation_lambda=schedule.activation_lambda,
            route_beta=schedule.route_beta,
            use_weight_aware_targets=schedule.use_weight_aware_targets,
            codes=config.codes,
            num_kept=config.support if config.codes == "ridge" else None,
            temperature=schedule.temperature,
            step_size=size,
            bank_update=bank_update,
            lambda_b=config.lambda_b,
        )
        medians.append(float(support(tried.alpha).double().median()))
        if _feasible(tried.alpha, config):
            return tried
        kept = objective(problem, adapters, alpha, bases, config.activation, schedule.activation_lambda)
        return dataclasses.replace(tried, adapters=adapters, alpha=alpha, bases=bases, objective=kept, accepted=False)

    medians = list[float]()
    before = objective(problem, adapters, alpha, bases, config.activation, schedule.activation_lambda)
    taken, size = step(adapters, alpha, bases, BACKTRACKS[0], "optimal_directions"), BACKTRACKS[0]
    for size in BACKTRACKS[1:]:
        if taken.accepted:
            break
        taken = step(adapters, alpha, bases, size, "optimal_directions")
    if taken.accepted and taken.objective <= SLOW * before:
        return taken, size, medians[0]
    for size in BACKTRACKS:
        refined = step(taken.adapters, taken.alpha, taken.bases, size, "gauss_newton")
        if refined.accepted:
            return refined, size, medians[0]
    return taken, size, medians[0]


class Alternation:
    """`am_step` as `run` moves it: backtracked, under its schedule or where that ends, whichever is lower there."""

    def __init__(self, problem: Problem, codes: Tensor, bases: Tensor, warm_targets: Tensor, config: FitConfig) -> None:
        self._problem, self._warm_targets, self._config = problem, warm_targets, config
        self.codes, self.bases, self._rejected_in_a_row = codes, bases, 0
        first = project(problem, codes, bases, config.activation)
        self._now = Iterate(first.objective, first.objective, first_schedule(config), num_fallbacks=first.num_fallbacks)

    def evaluate(self) -> Iterate:
        return self._now

    def move(self, step: int, schedule: Schedule) -> None:
        del step
        taken, now = self._take(schedule)
        if schedule != (end := last_schedule(schedule)):
            sooner = self._take(end)
            if math.isnan(now.objective) or sooner[1].objective <= now.objective:
                taken, now = sooner
        self.codes, self.bases, self._now = taken.alpha, taken.bases, now
        self._rejected_in_a_row = 0 if now.accepted else self._rejected_in_a_row + 1

    def fall_back(self, best: Best, now: Iterate, num_eligible: int) -> bool:
        del best, now, num_eligible
        return False

    def settled(self, records: Sequence[StepRecord], num_eligible: int) -> Outcome | None:
        if self._now.schedule != last_schedule(self._now.schedule):
            return None
        if self._rejected_in_a_row >= MAX_REJECTED:
            return "stalled"
        return "converged" if _settled(records, num_eligible, self._config.patience, self._config) else None

    def _take(self, schedule: Schedule) -> tuple[AMStep, Iterate]:
        """A step under a schedule, and where it ends."""
        problem, config, lambda_ = self._problem, self._config, schedule.activation_lambda
        now = project(problem, self.codes, self.bases, config.activation, lambda_, adapters=True)
        assert now.adapters is not None
        taken, size, median = _backtrack(
            problem, now.adapters, self.codes, self.bases, self._warm_targets, schedule, config
        )
        final = taken.objective
        if not math.isfinite(taken.candidate_objective):
            final = math.nan
        elif lambda_ != 1.0:
            final = project(problem, taken.alpha, taken.bases, config.activation).objective
        step_size = size if taken.accepted else 0.0
        return taken, Iterate(final, taken.objective, schedule, step_size, taken.accepted, median, taken.num_fallbacks)
