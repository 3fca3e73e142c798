from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from globe.bank import objective as module
from globe.bank.activations import activate
from globe.bank.factors import mix
from globe.bank.objective import InputMetric, Problem, expert_chunks, objective, project, relative_errors
from tests.random_experts import F64, normal, second_moment

E, P, D, R, M = 5, 6, 8, 4, 3
PHI = {"identity": lambda t: t, "silu": lambda t: t * torch.sigmoid(t), "tanh": torch.tanh}
HOMOTOPIES = [("identity", 1.0), ("silu", 0.0), ("silu", 0.4), ("silu", 1.0), ("tanh", 0.7), ("tanh", 1.0)]
GROUPS = (0, None, 0, 1, 1)


def make_problem(columns_weighed: bool, lambda_a: float = 1e-6) -> Problem:
    metric = InputMetric(torch.stack([second_moment(D), second_moment(D, seed=1)]), GROUPS)
    return Problem(normal(E, P, D), metric if columns_weighed else None, lambda_a)


def naive_objective(
    problem: Problem, adapters: Tensor, codes: Tensor, bases: Tensor, activation: str, activation_lambda: float
) -> Tensor:
    """The docstring's formula with a loop over experts and an explicit root of each one's C."""
    missed = energy = torch.zeros((), dtype=F64)
    for e, weight in enumerate(problem.weights):
        t = sum(codes[e, j] * bases[j] for j in range(M))
        n = (1 - activation_lambda) * t + activation_lambda * PHI[activation](t)
        root, group = torch.eye(D, dtype=F64), GROUPS[e]
        if problem.metric is not None and group is not None:
            root = torch.linalg.cholesky(problem.metric.second_moments[group])
        missed = missed + ((weight - adapters[e] @ n) @ root).square().sum()
        energy = energy + (weight @ root).square().sum()
    return missed / energy


@pytest.mark.parametrize("columns_weighed", [False, True])
@pytest.mark.parametrize(("activation", "activation_lambda"), HOMOTOPIES)
def test_objective_is_the_formula(activation: str, activation_lambda: float, columns_weighed: bool):
    problem = make_problem(columns_weighed)
    factors = normal(E, P, R, seed=1), normal(E, M, seed=2), normal(M, R, D, seed=3)
    found = objective(problem, *factors, activation, activation_lambda)
    assert found == pytest.approx(float(naive_objective(problem, *factors, activation, activation_lambda)), rel=1e-12)


@pytest.mark.parametrize("columns_weighed", [False, True])
@pytest.mark.parametrize(("activation", "activation_lambda"), HOMOTOPIES)
def test_gradient_is_autograds_at_fixed_exact_adapters(
    activation: str, activation_lambda: float, columns_weighed: bool
):
    problem = make_problem(columns_weighed)
    codes, bases = normal(E, M, seed=2), normal(M, R, D, seed=3)
    found = project(problem, codes, bases, activation, activation_lambda, gradient=True, adapters=True)
    assert found.adapters is not None
    codes.requires_grad_()
    bases.requires_grad_()
    value = naive_objective(problem, found.adapters, codes, bases, activation, activation_lambda)
    grad_codes, grad_bases = torch.autograd.grad(value, (codes, bases))
    assert found.objective == pytest.approx(float(value.detach()), rel=1e-12)
    torch.testing.assert_close(found.grad_codes, grad_codes)
    torch.testing.assert_close(found.grad_bases, grad_bases)


@pytest.mark.parametrize(("activation", "activation_lambda"), HOMOTOPIES)
def test_gradient_is_that_of_the_eliminated_objective(activation: str, activation_lambda: float):
    """Finite differences through the refit itself: eliminating A adds nothing to the gradient."""
    problem = make_problem(True, lambda_a=0.0)
    codes, bases = normal(E, M, seed=2), normal(M, R, D, seed=3)
    found = project(problem, codes, bases, activation, activation_lambda, gradient=True)
    for seed in range(3):
        to_codes, to_bases = normal(E, M, seed=10 + seed), normal(M, R, D, seed=20 + seed)
        ahead, behind = (
            project(problem, codes + h * to_codes, bases + h * to_bases, activation, activation_lambda).objective
            for h in (1e-5, -1e-5)
        )
        assert found.grad_codes is not None
        assert found.grad_bases is not None
        slope = (found.grad_codes * to_codes).sum() + (found.grad_bases * to_bases).sum()
        assert (ahead - behind) / 2e-5 == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


def test_projection_is_the_minimum_over_adapters():
    problem = make_problem(False, lambda_a=0.0)
    codes, bases = normal(E, M, seed=2), normal(M, R, D, seed=3)
    features = activate(mix(codes, bases), "tanh")
    missed = 0.0
    for weight, n in zip(problem.weights, features, strict=True):
        best = torch.linalg.lstsq(n.mT, weight.mT).solution.mT
        missed += float((weight - best @ n).square().sum())
    found = project(problem, codes, bases, "tanh", adapters=True)
    assert found.objective == pytest.approx(missed / float(problem.weights.square().sum()))
    assert found.adapters is not None
    assert objective(problem, found.adapters, codes, bases, "tanh") == pytest.approx(found.objective, rel=1e-12)


@pytest.mark.parametrize("experts_per_chunk", [1, 2, 4])
def test_chunks_change_nothing(experts_per_chunk: int, monkeypatch: pytest.MonkeyPatch):
    problem = make_problem(True)
    codes, bases = normal(E, M, seed=2), normal(M, R, D, seed=3)
    whole = project(problem, codes, bases, "silu", 0.6, gradient=True, adapters=True)
    assert whole.adapters is not None
    whole_objective = objective(problem, whole.adapters, codes, bases, "silu", 0.6)
    energy = problem.energy()
    monkeypatch.setattr(module, "CHUNK_BYTES", experts_per_chunk * P * D * 8)
    monkeypatch.setattr(module, "LEAST_EXPERTS", 1)
    assert len(expert_chunks(problem.weights)) == -(-E // experts_per_chunk)
    parts = project(problem, codes, bases, "silu", 0.6, gradient=True, adapters=True)
    assert parts.objective == pytest.approx(whole.objective, rel=1e-13)
    torch.testing.assert_close(parts.grad_codes, whole.grad_codes)
    torch.testing.assert_close(parts.grad_bases, whole.grad_bases)
    torch.testing.assert_close(parts.adapters, whole.adapters)
    assert objective(problem, whole.adapters, codes, bases, "silu", 0.6) == pytest.approx(whole_objective, rel=1e-13)
    torch.testing.assert_close(problem.energy(), energy)


@given(experts=st.integers(1, 9), chunk_bytes=st.integers(0, 2000))
def test_chunks_cover_every_expert_once_within_the_bound(experts: int, chunk_bytes: int):
    x = torch.zeros(experts, 3, 5)  # 60 bytes an expert
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        chunks = expert_chunks(x)
    assert [e for chunk in chunks for e in range(experts)[chunk]] == list(range(experts))
    assert all(x[chunk].nbytes <= max(chunk_bytes, 4 * 60) for chunk in chunks)


def test_a_wide_bank_is_read_by_a_tenth_as_many_experts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)
    assert [chunk.stop - chunk.start for chunk in expert_chunks(torch.zeros(20, 3, 5), num_bases=64)] == [6, 6, 6, 2]


def test_fallbacks_are_summed_over_chunks(monkeypatch: pytest.MonkeyPatch):
    bases = torch.ones(1, 2, 4, dtype=F64)  # two equal rows: singular for every expert
    problem = Problem(normal(3, 3, 4), lambda_a=0.0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "LEAST_EXPERTS", 1)
    found = project(problem, torch.ones(3, 1, dtype=F64), bases, "identity")
    assert found.num_fallbacks == 3
    assert 0 < found.objective < 1


@pytest.mark.parametrize("activation", ["identity", "silu", "tanh"])
def test_exact_factors_have_no_error(activation: str):
    codes, bases, adapters = normal(E, M, seed=2), normal(M, R, D, seed=3), normal(E, P, R, seed=1)
    problem = Problem(adapters @ PHI[activation](mix(codes, bases)), lambda_a=0.0)
    assert objective(problem, adapters, codes, bases, activation) < 1e-28
    found = project(problem, codes, bases, activation, adapters=True)
    assert found.objective < 1e-24
    torch.testing.assert_close(found.adapters, adapters)


def test_inputs_are_left_alone():
    problem, codes, bases = make_problem(True), normal(E, M, seed=2), normal(M, R, D, seed=3)
    kept = [x.clone() for x in (problem.weights, codes, bases)]
    project(problem, codes, bases, "silu", 0.5, gradient=True, adapters=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, (problem.weights, codes, bases), strict=True))


def test_relative_errors_are_per_expert():
    weights = normal(3, 4, 5)
    approximation = weights.clone()
    approximation[1] *= 0.75
    approximation[2] = 0
    torch.testing.assert_close(relative_errors(weights, approximation), torch.tensor([0.0, 0.25, 1.0], dtype=F64))
    nothing = torch.zeros(1, 4, 5)
    assert relative_errors(nothing, nothing).tolist() == [0.0]


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_relative_errors_do_not_depend_on_the_units(unit: float):
    """The squares of such float32 leave its range."""
    weights, noise = normal(3, 4, 5).float(), 0.1 * normal(3, 4, 5, seed=1).float()
    found = relative_errors(unit * weights, unit * (weights + noise))
    torch.testing.assert_close(found, relative_errors(weights, weights + noise), rtol=1e-5, atol=0)
