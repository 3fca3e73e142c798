from __future__ import annotations

import pytest
import torch
from torch import Tensor

from globe.bank.activations import activate, jacobian
from globe.bank.bases import NORM_FLOOR, gauss_newton_bases, normalize_atoms, optimal_directions
from globe.bank.factors import mix
from globe.bank.linalg import norms
from tests.random_experts import F64, normal, second_moment

E, P, D, R, M = 9, 6, 7, 4, 3
EXACT = {"lambda_b": 0.0, "max_iterations": 500, "tolerance": 1e-13}


def test_optimal_directions_are_least_squares():
    codes, targets = normal(E, M), normal(E, R, D, seed=1)
    bases, failed = optimal_directions(codes, targets, lambda_b=0)
    expected = torch.linalg.lstsq(codes, targets.flatten(1)).solution.view(M, R, D)
    torch.testing.assert_close(bases, expected)
    assert failed == 0


def test_optimal_directions_ridge_is_in_units_of_the_mean_diagonal():
    codes, targets = normal(E, M), normal(E, R, D, seed=1)
    gram = codes.mT @ codes
    ridge = 0.2 * gram.trace() / M * torch.eye(M)
    expected = torch.linalg.inv(gram + ridge) @ codes.mT @ targets.flatten(1)
    torch.testing.assert_close(optimal_directions(codes, targets, lambda_b=0.2)[0].flatten(1), expected)


def test_optimal_directions_recover_planted_bases_and_report_a_failure():
    codes, bases = normal(E, M), normal(M, R, D, seed=1)
    torch.testing.assert_close(optimal_directions(codes, mix(codes, bases), lambda_b=0)[0], bases)
    codes = torch.ones(E, M, dtype=F64)  # aᵀa singular exactly
    found, failed = optimal_directions(codes, mix(codes, bases), lambda_b=0)
    assert failed == 1
    torch.testing.assert_close(mix(codes, found), mix(codes, bases))


def dense_update(
    weights: Tensor, adapters: Tensor, codes: Tensor, bases: Tensor, activation: str, activation_lambda: float
) -> Tensor:
    """The minimiser over ΔB, column by column, from an explicit design matrix (E·P, M·R)."""
    mixed = mix(codes, bases)
    slope = jacobian(mixed, activation, activation_lambda)
    residual = weights - adapters @ activate(mixed, activation, activation_lambda)
    delta = torch.zeros_like(bases)
    for d in range(D):
        design = torch.einsum("epr,er,ej->epjr", adapters, slope[:, :, d], codes).reshape(E * P, M * R)
        delta[:, :, d] = torch.linalg.lstsq(design, residual[:, :, d].flatten()).solution.view(M, R)
    return bases + delta


def test_gauss_newton_for_identity_solves_the_kronecker_system():
    """Σ_e a_ej A_eᵀA_e (Σ_k a_ek B_k) = Σ_e a_ej A_eᵀ W_e, assembled as Σ_e (a_e a_eᵀ) ⊗ (A_eᵀA_e)."""
    weights, adapters, codes = normal(E, P, D), normal(E, P, R, seed=1), normal(E, M, seed=2)
    system = sum(torch.kron(torch.outer(codes[e], codes[e]), adapters[e].mT @ adapters[e]) for e in range(E))
    right = sum(torch.kron(codes[e][:, None], adapters[e].mT @ weights[e]) for e in range(E))
    expected = torch.linalg.solve(system, right).view(M, R, D)
    for start in (torch.zeros(M, R, D, dtype=F64), normal(M, R, D, seed=3)):
        found = gauss_newton_bases(weights, adapters, codes, start, "identity", **EXACT)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("activation", "activation_lambda"), [("tanh", 1.0), ("silu", 1.0), ("silu", 0.4)])
def test_gauss_newton_solves_the_linearised_problem(activation: str, activation_lambda: float):
    weights, adapters, codes = normal(E, P, D), normal(E, P, R, seed=1), normal(E, M, seed=2)
    bases = 0.5 * normal(M, R, D, seed=3)
    found = gauss_newton_bases(weights, adapters, codes, bases, activation, activation_lambda, **EXACT)
    expected = dense_update(weights, adapters, codes, bases, activation, activation_lambda)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_gauss_newton_leaves_no_gradient_in_a_metric():
    """Σ_e a_ej A_eᵀ (W_e − A_e T_e) C_e = 0 for every j, with a C for each expert."""
    weights, adapters, codes = normal(E, P, D), normal(E, P, R, seed=1), normal(E, M, seed=2)
    metric = torch.stack([(1 + e) * second_moment(D, seed=e) for e in range(E)])
    found = gauss_newton_bases(
        weights, adapters, codes, normal(M, R, D, seed=3), "identity", weigh=lambda x: x @ metric, **EXACT
    )
    missed = weights - adapters @ torch.einsum("ej,jrd->erd", codes, found)
    left = torch.einsum("ej,epr,epd,edc->jrc", codes, adapters, missed, metric)
    assert left.abs().max() < 1e-8 * torch.einsum("ej,epr,epd,edc->jrc", codes, adapters, weights, metric).abs().max()


@pytest.mark.parametrize("activation", ["identity", "silu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gauss_newton_nears_planted_bases(activation: str, dtype: torch.dtype):
    adapters, codes = normal(E, P, R, seed=1, dtype=dtype), normal(E, M, seed=2, dtype=dtype)
    planted = normal(M, R, D, seed=3, dtype=dtype)
    weights = adapters @ activate(mix(codes, planted), activation)
    start = planted + 0.02 * normal(M, R, D, seed=4, dtype=dtype)

    def missed(bases: Tensor) -> float:
        return float((weights - adapters @ activate(mix(codes, bases), activation)).norm())

    found = gauss_newton_bases(weights, adapters, codes, start, activation)
    assert found.dtype == dtype
    assert missed(found) < 0.1 * missed(start)


def test_a_few_iterations_already_lower_the_objective():
    weights, adapters, codes = normal(E, P, D), normal(E, P, R, seed=1), normal(E, M, seed=2)
    bases = normal(M, R, D, seed=3)
    errors = [float((weights - adapters @ mix(codes, bases)).norm())]
    for iterations in (1, 2, 4, 8):
        found = gauss_newton_bases(weights, adapters, codes, bases, "identity", max_iterations=iterations)
        errors.append(float((weights - adapters @ mix(codes, found)).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_gauss_newton_leaves_an_exact_bank_and_a_dead_one_alone(activation: str):
    adapters, codes, bases = normal(E, P, R, seed=1), normal(E, M, seed=2), normal(M, R, D, seed=3)
    weights = adapters @ activate(mix(codes, bases), activation)
    torch.testing.assert_close(gauss_newton_bases(weights, adapters, codes, bases, activation), bases)
    dead = torch.zeros_like(codes)
    assert torch.equal(gauss_newton_bases(weights, adapters, dead, bases, activation), bases)


def test_normalized_atoms_leave_the_mixtures_unchanged():
    codes, bases = normal(E, M), normal(M, R, D, seed=1) * torch.tensor([1e-3, 1.0, 1e3], dtype=F64)[:, None, None]
    new_codes, new_bases = normalize_atoms(codes, bases)
    torch.testing.assert_close(norms(new_bases), torch.ones(M, dtype=F64))
    torch.testing.assert_close(mix(new_codes, new_bases), mix(codes, bases))


def test_a_dead_atom_is_not_blown_up():
    bases = normal(M, R, D)
    bases[1] = 0
    bases[2] *= 1e-3 * NORM_FLOOR / bases[2].norm()
    new_codes, new_bases = normalize_atoms(normal(E, M), bases)
    assert new_bases.isfinite().all()
    assert new_codes.isfinite().all()
    assert (new_bases[1] == 0).all()
    assert float(new_bases[2].norm()) == pytest.approx(1e-3)
