from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.bank.adapters import refit_adapters
from tests.random_experts import F64, normal, second_moment

E, P, D, R = 4, 5, 9, 3


def test_equals_least_squares_per_expert():
    weights, features = normal(E, P, D), normal(E, R, D, seed=1)
    adapters, num_fallbacks = refit_adapters(weights, features, lambda_a=0)
    for e in range(E):
        expected = torch.linalg.lstsq(features[e].mT, weights[e].mT).solution.mT
        torch.testing.assert_close(adapters[e], expected)
    assert num_fallbacks == 0


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 5), weighed=st.booleans())
def test_normal_equations_hold(seed: int, rank: int, weighed: bool):
    weights, features = normal(E, P, D, seed=seed), normal(E, rank, D, seed=seed + 1)
    metric = second_moment(D, seed) if weighed else torch.eye(D, dtype=F64)
    adapters, _ = refit_adapters(weights, features, lambda_a=0, weighed=features @ metric if weighed else None)
    gradient = (weights - adapters @ features) @ metric @ features.mT
    assert gradient.abs().max() < 1e-9 * (weights @ metric @ features.mT).abs().max()


def test_second_moment_weighs_the_residual():
    """With C = LLᵀ the fit is the ordinary one of W L on N L."""
    weights, features, c = normal(E, P, D), normal(E, R, D, seed=1), second_moment(D)
    root = torch.linalg.cholesky(c)
    adapters, _ = refit_adapters(weights, features, lambda_a=0, weighed=features @ c)
    expected, _ = refit_adapters(weights @ root, features @ root, lambda_a=0)
    torch.testing.assert_close(adapters, expected)
    assert not torch.allclose(adapters, refit_adapters(weights, features)[0], atol=1e-3)


def test_ridge_is_in_units_of_the_mean_diagonal():
    weights, features = normal(E, P, D), normal(E, R, D, seed=1)
    adapters, _ = refit_adapters(weights, features, lambda_a=0.5)
    for e in range(E):
        gram = features[e] @ features[e].mT
        ridge = 0.5 * gram.trace() / R * torch.eye(R, dtype=F64)
        torch.testing.assert_close(adapters[e], weights[e] @ features[e].mT @ torch.linalg.inv(gram + ridge))
    rescaled, _ = refit_adapters(weights, 100 * features, lambda_a=0.5)
    torch.testing.assert_close(100 * rescaled, adapters)


def test_singular_features_fall_back_counted_and_stay_optimal():
    weights, features = normal(3, P, D), normal(3, R, D, seed=1)
    features[1] = torch.arange(D, dtype=F64)  # R equal rows of integers: a Gram matrix that is singular exactly
    adapters, num_fallbacks = refit_adapters(weights, features, lambda_a=0)
    assert num_fallbacks == 1
    assert adapters.isfinite().all()
    best = torch.linalg.lstsq(features[1].mT, weights[1].mT, driver="gelsd").solution.mT
    torch.testing.assert_close(adapters[1] @ features[1], best @ features[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_rank_than_columns_is_finite_and_exact(dtype: torch.dtype):
    weights, features = normal(2, P, 4, dtype=dtype), normal(2, 6, 4, seed=1, dtype=dtype)
    adapters, _ = refit_adapters(weights, features)
    assert adapters.dtype == dtype
    assert (weights - adapters @ features).abs().max() < 2e-3


def test_an_expert_without_features_gets_a_zero_adapter():
    adapters, _ = refit_adapters(normal(2, P, D), torch.zeros(2, R, D, dtype=F64))
    assert (adapters == 0).all()
