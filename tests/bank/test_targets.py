from __future__ import annotations

import pytest
import torch

from globe.bank.activations import activate, jacobian
from globe.bank.targets import JACOBIAN_FLOOR, blend_targets, wanted_features, weight_aware_targets
from tests.random_experts import normal

E, P, D, R = 4, 6, 8, 3


def test_wanted_features_are_least_squares_per_expert():
    weights, adapters = normal(E, P, D), normal(E, P, R, seed=1)
    found = wanted_features(weights, adapters, lambda_t=0)
    for e in range(E):
        torch.testing.assert_close(found[e], torch.linalg.lstsq(adapters[e], weights[e]).solution)


def test_ridge_is_in_units_of_the_mean_diagonal():
    weights, adapters = normal(E, P, D), normal(E, P, R, seed=1)
    found = wanted_features(weights, adapters, lambda_t=0.3)
    gram = adapters.mT @ adapters
    ridge = 0.3 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(R)
    torch.testing.assert_close(found, torch.linalg.inv(gram + ridge) @ adapters.mT @ weights)


def test_square_invertible_adapters_reproduce_the_weights():
    weights, adapters = normal(E, P, D), normal(E, P, P, seed=1) + 3 * torch.eye(P)
    torch.testing.assert_close(adapters @ wanted_features(weights, adapters, lambda_t=0), weights)


@pytest.mark.parametrize(("activation", "activation_lambda"), [("identity", 1.0), ("tanh", 0.0), ("silu", 0.0)])
def test_linear_targets_are_the_features_themselves(activation: str, activation_lambda: float):
    wanted, mixed = normal(E, R, D), normal(E, R, D, seed=2)
    assert torch.equal(weight_aware_targets(wanted, mixed, activation, activation_lambda), wanted)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize("activation_lambda", [0.4, 1.0])
def test_correction_is_divided_by_the_blended_jacobian(activation: str, activation_lambda: float):
    mixed = 0.8 * normal(E, R, D, seed=2).clamp(-1, 1)  # where every slope is above the floor
    wanted = normal(E, R, D)
    slope = jacobian(mixed, activation, activation_lambda)
    assert slope.min() > JACOBIAN_FLOOR
    found = weight_aware_targets(wanted, mixed, activation, activation_lambda)
    torch.testing.assert_close((found - mixed) * slope, wanted - activate(mixed, activation, activation_lambda))


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_a_newton_step_solves_for_the_features_to_second_order(activation: str):
    """With W = A φ(T + δ), the targets are T + δ up to O(δ²)."""
    mixed, adapters = 0.5 * normal(E, R, D, seed=2).clamp(-1, 1), normal(E, P, R, seed=1)
    missed = {}
    for size in (1e-2, 1e-3):
        moved = mixed + size * normal(E, R, D, seed=3)
        wanted = wanted_features(adapters @ activate(moved, activation), adapters, lambda_t=0)
        missed[size] = (weight_aware_targets(wanted, mixed, activation, 1.0) - moved).norm()
    assert missed[1e-3] < 0.02 * missed[1e-2]  # 100 times less for second order, 10 times for first


@pytest.mark.parametrize("floor", [JACOBIAN_FLOOR, 0.3])
@pytest.mark.parametrize(("activation", "at"), [("tanh", 12.0), ("tanh", 400.0), ("silu", -1.2784), ("silu", -3.0)])
def test_slope_is_floored_in_magnitude_and_keeps_its_sign(activation: str, at: float, floor: float):
    mixed = torch.full((1, 1, 1), at, dtype=torch.float64)
    wanted = activate(mixed, activation) + 1
    step = float(weight_aware_targets(wanted, mixed, activation, 1.0, floor=floor) - mixed)
    slope = float(jacobian(mixed, activation))
    assert abs(slope) < floor
    assert step == pytest.approx(-1 / floor if slope < 0 else 1 / floor)


def test_blend_goes_from_warm_to_weight_aware():
    warm, aware = normal(E, R, D), normal(E, R, D, seed=1)
    assert torch.equal(blend_targets(warm, aware, 0.0), warm)
    torch.testing.assert_close(blend_targets(warm, aware, 1.0), aware)
    torch.testing.assert_close(blend_targets(warm, aware, 0.3), 0.7 * warm + 0.3 * aware)
