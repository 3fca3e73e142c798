from __future__ import annotations

from typing import get_args

from globe.bank.factors import Factors
from globe.train.result import MEANING, FitResult, FitStats, Outcome, StepRecord
from tests.random_experts import normal


def test_every_outcome_is_put_into_words():
    assert set(MEANING) == set(get_args(Outcome))
    assert all(MEANING.values())


def test_history_is_the_error_of_every_step():
    steps = tuple(StepRecord(i, error, error, 1.0, 1.0, 1.0, 4.0, 1.0, 1.0) for i, error in enumerate((0.5, 0.4, 0.4)))
    factors = Factors(normal(2, 3, 2), normal(2, 1), normal(1, 2, 4), "tanh")
    result = FitResult(factors, "max_steps", steps, FitStats())
    assert result.history == [0.5, 0.4, 0.4]
    assert repr(result) == (
        "FitResult(max_steps: relative error 0.4000 after 2 steps, 1 bases of rank 2 for 2 experts)"
    )
