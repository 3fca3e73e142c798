"""The naive step computes what the package computes, so that their times can be compared."""

from __future__ import annotations

import torch

from benchmarks.naive import adapters_by_pinv, directions_by_inverse, naive_step
from globe.bank.adapters import refit_adapters
from globe.bank.bases import optimal_directions
from globe.bank.factors import mix
from globe.bank.objective import Problem, objective
from globe.init.init_bank import am_step
from globe.init.warm_start import warm_start
from tests.random_experts import normal


def test_directions() -> None:
    codes, targets = normal(9, 3, dtype=torch.float32), normal(9, 4, 7, dtype=torch.float32)
    torch.testing.assert_close(directions_by_inverse(codes, targets), optimal_directions(codes, targets)[0])


def test_adapters() -> None:
    weights, features = normal(3, 5, 20, dtype=torch.float32), normal(3, 4, 20, seed=1, dtype=torch.float32)
    exact = refit_adapters(weights, features, lambda_a=1e-9)[0]
    torch.testing.assert_close(adapters_by_pinv(weights, features), exact, atol=1e-4, rtol=1e-3)


def test_step() -> None:
    weights = normal(10, 6, 12, dtype=torch.float32)
    start = warm_start(weights, 5, 4)
    problem = Problem(weights)
    adapters = refit_adapters(weights, mix(start.codes, start.bases))[0]
    taken = am_step(
        problem,
        adapters,
        start.codes,
        start.bases,
        start.targets,
        activation="silu",
        activation_lambda=0.5,
        route_beta=1.0,
        use_weight_aware_targets=True,
    )
    stepped = naive_step(weights, adapters, start.codes, start.bases, "silu", 0.5)
    found = objective(problem, *stepped, "silu", 0.5)
    assert abs(found - taken.candidate_objective) < 1e-4 * taken.candidate_objective
