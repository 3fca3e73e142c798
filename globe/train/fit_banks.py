"""Fitting a bank: scheduling, acceptance and stopping for both solvers.

Everything that changes from step to step is decided here: the homotopy λ, the blending β, the switch to Route-W, the
temperature, the step size and its backtracking, when to stop and which factors to keep.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from globe.bank.codes import entropy, popularity, spread_codes, support, update_temperature
from globe.bank.factors import Factors
from globe.bank.linalg import norms
from globe.bank.objective import InputMetric, Problem, expert_chunks, objective, project
from globe.errors import GlobeError, SettingsError
from globe.init.init_bank import AMStep, BankUpdate, am_step
from globe.init.warm_start import WarmStart, warm_start
from globe.machine.device import usable_device
from globe.train.config import FitConfig
from globe.train.result import FitResult, Outcome, StepRecord
from globe.train.varpro import VariableProjection, rounded_bank

SAFE_DEVIATION = (1e-4, 1e4)
"""Experts whose standard deviation lies between these are fitted as they are, others divided by it: their squares would
leave the range of float32."""
FAINT = 1e-6
"""Experts whose root mean square is a smaller share of all experts' are fitted as if it were this one, their adapters
made smaller then: to the objective they are nothing, but the squares of their features would leave float32's range."""
TEMPERATURE_RATE = 0.3
BACKTRACKS = (1.0, 0.5, 0.25)
SLOW = 0.99
MAX_REJECTED = 5
ROUND_FROM = 0.4
"""Share of varpro's steps after which the bank is rounded; measured, see docs/log.md."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The scheduled values of one step."""

    activation_lambda: float
    """λ of φ_λ: 0 linear, 1 the activation itself."""
    route_beta: float
    """β: share of the weight-aware targets."""
    use_weight_aware_targets: bool
    """Route-W: fit the weight-aware targets alone."""
    temperature: float
    """Temperature of codes on the simplex."""


def first_schedule(config: FitConfig) -> Schedule:
    """am starts linear on the warm start's targets; varpro needs neither homotopy nor targets."""
    if config.solver == "varpro":
        return Schedule(1.0, 1.0, True, config.temperature)
    return Schedule(1.0 if config.activation == "identity" else 0.0, 0.0, False, config.temperature)


def last_schedule(now: Schedule) -> Schedule:
    """Where the schedule ends: the activation itself, Route-W."""
    return dataclasses.replace(now, activation_lambda=1.0, route_beta=1.0, use_weight_aware_targets=True)


def next_schedule(now: Schedule, step: int, accepted: bool, median_support: float, config: FitConfig) -> Schedule:
    """The values of step `step` + 1, by the step count and by how step `step` went.

    β rises to 1 over the first quarter of the steps, then Route-W takes over; λ rises to 1 over the first half. After a
    rejected step λ waits, so that the bank settles at the present nonlinearity; β moves on, for the targets are what
    was rejected. From the half onward λ is 1 whatever happened: the fit ends on the true objective. A schedule that has
    ended stays there. The temperature steers the median support.
    """
    temperature = now.temperature
    if config.support is not None and config.codes != "ridge":
        temperature = update_temperature(
            temperature,
            median_support,
            config.support,
            rate=TEMPERATURE_RATE,
            lowest=config.min_temperature,
            highest=config.max_temperature,
        )
    if config.solver == "varpro":
        return dataclasses.replace(now, temperature=temperature)
    quarter, half = max(1, config.max_steps // 4), max(1, config.max_steps // 2)
    beta, lambda_ = max(now.route_beta, min(1.0, step / quarter)), now.activation_lambda
    if step >= half:
        lambda_ = 1.0
    elif accepted:
        lambda_ = min(1.0, lambda_ + 1 / half)
    return Schedule(lambda_, beta, beta == 1.0, temperature)


def step_length(step: int, max_steps: int, warm_up: int = 10) -> float:
    """varpro's share of the full step: linear warm-up, then a cosine to 0."""
    return min(1.0, step / warm_up) * 0.5 * (1 + math.cos(math.pi * (step - 1) / max_steps))


@dataclasses.dataclass
class Best:
    """The best feasible factors so far, a copy of its own; `objective` is f at λ = 1 and never rises."""

    objective: float
    codes: Tensor
    bases: Tensor

    def offer(self, objective: float, codes: Tensor, bases: Tensor) -> None:
        if objective < self.objective:
            self.objective = objective
            self.codes.copy_(codes)
            self.bases.copy_(bases)


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
    of `history`, which never rises. With `bank_bits` the adapters are those of the rounded bank, and the bases returned
    are the ones behind it, which round to it. The same input and settings give the same bytes on the same machine.
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
        num_experts, rows, columns = experts.shape
        factors = Factors(
            weights.new_zeros(num_experts, rows, config.rank).to(experts.device),
            weights.new_zeros(num_experts, config.num_bases).to(experts.device),
            weights.new_zeros(config.num_bases, config.rank, columns).to(experts.device),
            config.activation,
        )
        result = FitResult.of_zeros(factors, config.temperature, num_fallbacks=0)
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
    start_metrics, notify = start.metrics, on_step or _ignore
    if config.solver == "varpro":  # needs no targets, which are as large as the experts
        start = dataclasses.replace(start, targets=start.targets[:0].clone())
    best, num_fallbacks = _feasible_start(problem, start, config)
    if config.solver == "am":
        outcome, steps, metrics = _alternate(problem, best, start.targets, config, notify)
    else:
        del start
        outcome, steps, metrics = _varpro(problem, best, config, notify)
    metrics["num_fallbacks"] += num_fallbacks
    bases = rounded_bank(best.bases, config.bank_bits)
    final = project(problem, best.codes, bases, config.activation, adapters=True)
    del bases
    assert final.adapters is not None
    factors = Factors(
        final.adapters.mul_(sigma * back).to(experts.device),
        best.codes.to(experts.device),
        best.bases.to(experts.device),
        config.activation,
    )
    metrics |= {
        "trajectory": [record.raw_error for record in steps],
        "warm_start": start_metrics,
        "popularity": [float(share) for share in popularity(best.codes)],
    }
    return FitResult(factors, outcome, tuple(steps), metrics)


def _root_mean_square(weights: Tensor) -> Tensor:
    """The standard deviation, for a mean near 0; `GlobeError` for weights that are not finite."""
    found = (norms(weights).square().mean() / weights[0].numel()).sqrt()
    if SAFE_DEVIATION[0] < found < SAFE_DEVIATION[1]:
        return found
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
    found = weights[faint].cpu().double()
    shares = (norms(found) / least)[:, None, None]
    lifted = weights.clone()
    lifted[faint], back[faint] = (found / shares).to(weights), shares.to(weights)
    return lifted, back


def _ignore(_: StepRecord) -> None:
    pass


def _feasible_start(problem: Problem, start: WarmStart, config: FitConfig) -> tuple[Best, int]:
    """The warm start, codes on the simplex cut or spread to the support: what a fit must improve on."""
    codes = start.codes
    if config.codes != "ridge" and config.support is not None:
        codes = spread_codes(codes, config.support)
    first = project(problem, codes, rounded_bank(start.bases, config.bank_bits), config.activation)
    return Best(first.objective, codes, start.bases), first.num_fallbacks


def _feasible(codes: Tensor, config: FitConfig) -> bool:
    """Whether the median support is within 1 of the one asked for; signed codes have theirs by construction."""
    if config.codes == "ridge" or config.support is None:
        return True
    return abs(float(support(codes).double().median()) - config.support) <= 1


def _record(step: int, best: Best, raw: float, codes: Tensor, schedule: Schedule, step_size: float) -> StepRecord:
    return StepRecord(
        step,
        best.objective**0.5,
        raw**0.5,
        schedule.activation_lambda,
        schedule.route_beta,
        schedule.temperature,
        float(support(codes).double().median()),
        float(entropy(codes).mean()),
        step_size,
    )


def _settled(steps: list[StepRecord], num_eligible: int, patience: int, config: FitConfig) -> bool:
    """Whether the error has stopped falling over `patience` steps, when the last `num_eligible` could lower it."""
    if num_eligible <= patience:
        return False
    earlier = steps[-1 - patience].error
    return earlier - steps[-1].error <= config.tolerance * earlier


Run = tuple[Outcome, list[StepRecord], dict[str, Any]]


def _varpro(problem: Problem, best: Best, config: FitConfig, on_step: Callable[[StepRecord], None]) -> Run:
    """Move `best`."""
    solver = VariableProjection(
        problem,
        best.codes,
        best.bases,
        config.activation,
        config.codes,
        config.learning_rate,
        config.temperature,
        fixed_support=config.codes == "ridge" and config.support is not None,
    )
    schedule, shrink, num_restarts, num_feasible, num_fallbacks = first_schedule(config), 1.0, 0, 0, 0
    steps = [_record(0, best, best.objective, best.codes, schedule, 0.0)]
    on_step(steps[0])
    outcome: Outcome = "max_steps"
    if not math.isfinite(best.objective):
        return "non_finite", steps, {"num_fallbacks": 0, "num_restarts": 0}
    for step in range(1, config.max_steps + 1):
        length = shrink * step_length(step, config.max_steps)
        bank_bits = config.bank_bits if step >= ROUND_FROM * config.max_steps else None
        solver.step(length, schedule.temperature, bank_bits)
        num_fallbacks += solver.num_fallbacks
        if not math.isfinite(solver.objective):
            outcome = "non_finite"
            break
        if _feasible(solver.codes, config) and bank_bits == config.bank_bits:
            num_feasible += 1
            best.offer(solver.objective, solver.codes, solver.bases)
        steps.append(_record(step, best, solver.objective, solver.codes, schedule, length))
        on_step(steps[-1])
        schedule = next_schedule(schedule, step, True, steps[-1].median_support, config)
        if num_feasible > config.patience and solver.objective > best.objective * (1 + config.window) ** 2:
            solver.restart(best.codes, best.bases, schedule.temperature)
            shrink, num_restarts = shrink / 2, num_restarts + 1
        # long steps far from the end may find nothing better for a while
        if _settled(steps, num_feasible, max(config.patience, config.max_steps // 4), config):
            outcome = "converged"
            break
    return outcome, steps, {"num_fallbacks": num_fallbacks, "num_restarts": num_restarts}


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


def _alternate(
    problem: Problem, best: Best, warm_targets: Tensor, config: FitConfig, on_step: Callable[[StepRecord], None]
) -> Run:
    """Move `best`; `warm_targets` are S_L."""
    alpha, bases, schedule, num_fallbacks = best.codes.clone(), best.bases.clone(), first_schedule(config), 0
    steps = [_record(0, best, best.objective, alpha, schedule, 0.0)]
    on_step(steps[0])
    outcome: Outcome = "max_steps"
    if not math.isfinite(best.objective):
        return "non_finite", steps, {"num_fallbacks": 0, "num_rejected": 0}
    num_rejected = rejected_in_a_row = num_final = 0

    def take(schedule: Schedule) -> tuple[AMStep, float, float, float]:
        """A step under a schedule as `_backtrack` returns it, and f at λ = 1 of where it ends."""
        now = project(problem, alpha, bases, config.activation, schedule.activation_lambda, adapters=True)
        assert now.adapters is not None
        found = _backtrack(problem, now.adapters, alpha, bases, warm_targets, schedule, config)
        if schedule.activation_lambda == 1.0 or not math.isfinite(found[0].candidate_objective):
            return *found, found[0].objective
        return *found, project(problem, found[0].alpha, found[0].bases, config.activation).objective

    for step in range(1, config.max_steps + 1):
        taken, size, wanted_support, final = take(schedule)
        if schedule != (end := last_schedule(schedule)):
            sooner = take(end)
            if sooner[-1] <= final:
                schedule, (taken, size, wanted_support, final) = end, sooner
        if not math.isfinite(taken.candidate_objective):
            outcome = "non_finite"
            break
        alpha, bases = taken.alpha, taken.bases
        num_fallbacks += taken.num_fallbacks
        best.offer(final, alpha, bases)
        rejected_in_a_row = 0 if taken.accepted else rejected_in_a_row + 1
        num_rejected += not taken.accepted
        steps.append(_record(step, best, taken.objective, alpha, schedule, size if taken.accepted else 0.0))
        on_step(steps[-1])
        if schedule.activation_lambda == 1.0 and schedule.use_weight_aware_targets:
            num_final += 1
            if rejected_in_a_row >= MAX_REJECTED:
                outcome = "stalled"
                break
            if _settled(steps, num_final, config.patience, config):
                outcome = "converged"
                break
        schedule = next_schedule(schedule, step, taken.accepted, wanted_support, config)
    return outcome, steps, {"num_fallbacks": num_fallbacks, "num_rejected": num_rejected}
