"""What a fit returns."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from globe.bank.factors import Factors

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
class FitResult:
    """The best factors of a fit and how it went."""

    factors: Factors
    """Adapters, codes and bases, in the units of the experts given."""
    outcome: Outcome
    """Why the fit stopped; `MEANING` says it in words."""
    steps: tuple[StepRecord, ...]
    """One record per step, the warm start as step 0."""
    metrics: dict[str, Any]
    """`trajectory` (relative error of every iterate), `warm_start` (its quality), `popularity` of the bases,
    `num_fallbacks` (adapters without a Cholesky factor), `num_restarts` or `num_rejected`."""

    @classmethod
    def of_zeros(cls, factors: Factors, temperature: float, **metrics: Any) -> FitResult:
        """That of experts that are all zero, from factors that are zero as well."""
        step = StepRecord(0, 0.0, 0.0, 1.0, 1.0, temperature, 0.0, 0.0, 0.0)
        unused: dict[str, Any] = {"trajectory": [0.0], "warm_start": {}, "popularity": [0.0] * len(factors.bases)}
        return cls(factors, "zero", (step,), {**unused, **metrics})

    @property
    def history(self) -> list[float]:
        """Relative error of the best factors after each step; never increases."""
        return [record.error for record in self.steps]
