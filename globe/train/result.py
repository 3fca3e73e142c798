"""What a fit returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from globe.bank.factors import Factors
from globe.typed import documented

Outcome = Literal["converged", "max_steps", "stalled", "non_finite", "zero"]

MEANING: dict[str, str] = {
    "converged": "the error stopped falling",
    "max_steps": "all steps were taken",
    "stalled": "no step could lower the objective any more",
    "non_finite": "a step gave NaN or Inf; the best factors before it are returned",
    "zero": "the experts are all zero, and so are the factors: nothing was to be fitted, the error is 0",
}


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step of a fit."""

    step: int
    error: float
    """Relative error of the best factors so far."""
    raw_error: float
    """Relative error of the iterate itself, under the step's own λ."""
    activation_lambda: float
    route_beta: float
    temperature: float
    median_support: float
    mean_entropy: float
    step_size: float
    """Share of the full step that was taken; 0 when none was accepted."""


@dataclasses.dataclass(frozen=True)
class FitStats:
    """What else a fit tells of itself."""

    warm_start: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    """Quality of the warm start."""
    popularity: tuple[float, ...] = ()
    """Each basis' share of the mixtures."""
    num_fallbacks: int = 0
    """Adapters that had no Cholesky factor, over all evaluations."""
    num_restarts: int = 0
    """varpro: returns to the best factors."""
    num_rejected: int = 0
    """am: steps that would have raised the objective."""


@documented
@dataclasses.dataclass(frozen=True)
class FitResult:
    """The best factors of a fit and how it went."""

    factors: Factors
    """Adapters, codes and bases, in the units of the experts given."""
    outcome: Outcome
    """Why the fit stopped; `MEANING` says it in words."""
    steps: tuple[StepRecord, ...]
    """One record per step, the warm start as step 0."""
    stats: FitStats

    @classmethod
    def of_zeros(cls, factors: Factors, temperature: float) -> FitResult:
        """That of experts that are all zero, from factors that are zero as well."""
        step = StepRecord(0, 0.0, 0.0, 1.0, 1.0, temperature, 0.0, 0.0, 0.0)
        return cls(factors, "zero", (step,), FitStats(popularity=(0.0,) * len(factors.bases)))

    def __repr__(self) -> str:
        return (
            f"FitResult({self.outcome}: relative error {self.history[-1]:.4f} after {self.steps[-1].step} steps, "
            f"{len(self.factors.bases)} bases of rank {self.factors.bases.shape[1]} for "
            f"{len(self.factors.adapters)} experts)"
        )

    @property
    def history(self) -> list[float]:
        """Relative error of the best factors after each step; never increases."""
        return [record.error for record in self.steps]
