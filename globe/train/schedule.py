"""What changes from step to step of a fit: the homotopy λ, the blending β, the switch to Route-W, the temperature, and
the step length of variable projection.
"""

from __future__ import annotations

import dataclasses
import math

from globe.bank.codes import update_temperature
from globe.train.config import FitConfig

TEMPERATURE_RATE = 0.3


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
