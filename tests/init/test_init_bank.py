from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from globe.bank.activations import activate
from globe.bank.adapters import refit_adapters
from globe.bank.bases import normalize_atoms, optimal_directions
from globe.bank.codes import ridge_codes, top_mask
from globe.bank.factors import mix
from globe.bank.linalg import norms
from globe.bank.objective import InputMetric, Problem, objective, project
from globe.bank.targets import blend_targets, wanted_features, weight_aware_targets
from globe.init.init_bank import AMStep, am_step
from globe.init.warm_start import warm_start
from tests.random_experts import normal, second_moment

E, P, D, R, M = 9, 5, 8, 4, 3
MAPS = ["ridge", "entmax15", "sparsemax", "softmax"]
HOMOTOPIES = [("identity", 1.0), ("tanh", 0.0), ("tanh", 0.5), ("silu", 1.0)]
SETTINGS: dict[str, Any] = {
    "activation": "identity",
    "activation_lambda": 1.0,
    "route_beta": 1.0,
    "use_weight_aware_targets": True,
}


def begin(codes: str = "ridge", seed: int = 0, **metric: Any) -> tuple[Problem, Tensor, Tensor, Tensor, Tensor]:
    """A problem and the factors of its warm start: problem, adapters, alpha, bases, warm targets."""
    problem = Problem(normal(E, P, D, seed=seed), **metric)
    start = warm_start(problem.weights, R, M, codes=codes, align_steps=2)
    first = project(problem, start.codes, start.bases, "identity", adapters=True)
    assert first.adapters is not None
    return problem, first.adapters, start.codes, start.bases, start.targets


def measured(problem: Problem, step: AMStep, settings: dict[str, Any]) -> float:
    return objective(
        problem, step.adapters, step.alpha, step.bases, settings["activation"], settings["activation_lambda"]
    )


@pytest.mark.parametrize("bank_update", ["optimal_directions", "gauss_newton"])
@pytest.mark.parametrize(("activation", "activation_lambda"), HOMOTOPIES)
@pytest.mark.parametrize("codes", MAPS)
def test_a_step_never_raises_the_objective_and_reports_it(
    codes: str, activation: str, activation_lambda: float, bank_update: str
):
    problem, adapters, alpha, bases, warm = begin(codes)
    settings = SETTINGS | {"activation": activation, "activation_lambda": activation_lambda}
    settings |= {"codes": codes, "bank_update": bank_update}
    last = objective(problem, adapters, alpha, bases, activation, activation_lambda)
    for _ in range(4):
        step = am_step(problem, adapters, alpha, bases, warm, **settings)
        assert step.objective <= last
        assert step.objective == pytest.approx(measured(problem, step, settings), rel=1e-12)
        assert step.accepted == (step.candidate_objective <= last)
        if step.accepted:
            assert step.candidate_objective == step.objective
        else:
            assert step.objective == last
            assert step.adapters is adapters
            assert step.alpha is alpha
            assert step.bases is bases
        if codes != "ridge":
            assert (step.alpha >= 0).all()
            torch.testing.assert_close(step.alpha.sum(1), torch.ones(E, dtype=step.alpha.dtype))
        adapters, alpha, bases, last = step.adapters, step.alpha, step.bases, step.objective


@pytest.mark.parametrize("codes", ["ridge", "entmax15"])
@pytest.mark.parametrize("bank_update", ["optimal_directions", "gauss_newton"])
def test_a_step_leaves_its_inputs_alone_and_repeats_itself(codes: str, bank_update: str):
    given = begin(codes)
    kept = [x.clone() for x in given[1:]]
    weights = given[0].weights.clone()
    settings = SETTINGS | {"activation": "silu", "activation_lambda": 0.5, "codes": codes, "bank_update": bank_update}
    first, second = am_step(*given, **settings), am_step(*given, **settings)
    assert all(torch.equal(a, b) for a, b in zip(kept, given[1:], strict=True))
    assert torch.equal(weights, given[0].weights)
    for name in ("adapters", "alpha", "bases"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.candidate_objective == second.candidate_objective


@pytest.mark.parametrize(("route_beta", "route_w"), [(0.0, False), (0.4, False), (1.0, False), (0.0, True)])
@pytest.mark.parametrize(("activation", "activation_lambda"), HOMOTOPIES)
def test_a_step_is_codes_targets_bank_adapters(
    activation: str, activation_lambda: float, route_beta: float, route_w: bool
):
    """The same step written out: Route-L blends by β, Route-W takes the weight-aware targets whatever β is.

    The targets are computed twice, for the codes and afresh for the bank at the new codes; the features wanted, once.
    """
    problem, adapters, alpha, bases, warm = begin()
    phi = (activation, activation_lambda)
    wanted = wanted_features(problem.weights, adapters)

    def targets(codes: Tensor) -> Tensor:
        aware = weight_aware_targets(wanted, mix(codes, bases), *phi)
        return aware if route_w else blend_targets(warm, aware, route_beta)

    new_alpha = ridge_codes(targets(alpha), bases)
    new_alpha, new_bases = normalize_atoms(new_alpha, optimal_directions(new_alpha, targets(new_alpha))[0])
    new_adapters, _ = refit_adapters(problem.weights, activate(mix(new_alpha, new_bases), *phi))
    expected = objective(problem, new_adapters, new_alpha, new_bases, *phi)
    settings = {"route_beta": route_beta, "use_weight_aware_targets": route_w}
    settings |= {"activation": activation, "activation_lambda": activation_lambda}
    step = am_step(problem, adapters, alpha, bases, warm, **settings)
    assert step.candidate_objective == pytest.approx(expected, rel=1e-9)
    if step.accepted:
        torch.testing.assert_close(step.alpha, new_alpha)
        torch.testing.assert_close(step.bases, new_bases)


def candidate(settings: dict[str, Any], codes: str = "ridge", seed: int = 0) -> float:
    return am_step(*begin(codes, seed), **(SETTINGS | settings)).candidate_objective


def test_routes_beta_lambda_temperature_and_step_size_all_have_an_effect():
    route_l = {"use_weight_aware_targets": False}
    assert candidate(route_l | {"route_beta": 1.0}) == pytest.approx(candidate({}), rel=1e-12)
    betas = [candidate(route_l | {"route_beta": beta}) for beta in (0.0, 0.5, 1.0)]
    assert len(set(betas)) == 3
    lambdas = [candidate({"activation": "tanh", "activation_lambda": value}) for value in (0.0, 0.5, 1.0)]
    assert len(set(lambdas)) == 3
    assert candidate({"activation": "tanh", "activation_lambda": 0.0}) == candidate({})
    temperatures = [candidate({"codes": "entmax15", "temperature": t}, "entmax15") for t in (0.5, 1.0, 2.0)]
    assert len(set(temperatures)) == 3
    sizes = [candidate({"step_size": size}) for size in (1.0, 0.5, 0.1)]
    assert len(set(sizes)) == 3


def test_route_l_at_beta_zero_returns_to_the_warm_targets():
    """S_L alone does not depend on where the step begins: the adapters only decide acceptance."""
    problem, adapters, alpha, bases, warm = begin()
    settings = SETTINGS | {"route_beta": 0.0, "use_weight_aware_targets": False}
    from_here = am_step(problem, adapters, alpha, bases, warm, **settings)
    from_noise = am_step(problem, normal(E, P, R, seed=5), normal(E, M, seed=6), bases, warm, **settings)
    assert from_here.candidate_objective == pytest.approx(from_noise.candidate_objective, rel=1e-9)
    assert from_noise.accepted


def test_small_steps_approach_the_start():
    problem, adapters, alpha, bases, warm = begin()
    before = objective(problem, adapters, alpha, bases, "identity")
    gaps = []
    for size in (1e-2, 1e-3, 1e-4):
        step = am_step(problem, adapters, alpha, bases, warm, step_size=size, **SETTINGS)
        gaps.append(abs(step.candidate_objective - before))
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]


def rejected_start() -> tuple[Problem, Tensor, Tensor, Tensor, Tensor]:
    """Exact factors of the weights, and warm targets that are noise: every full Route-L step must be refused."""
    adapters, alpha, bases = normal(E, P, R), normal(E, M, seed=1), normal(M, R, D, seed=2)
    return Problem(adapters @ mix(alpha, bases)), adapters, alpha, bases, normal(E, R, D, seed=3)


def test_a_rejected_step_returns_what_it_was_given():
    problem, adapters, alpha, bases, warm = rejected_start()
    settings = SETTINGS | {"route_beta": 0.0, "use_weight_aware_targets": False}
    step = am_step(problem, adapters, alpha, bases, warm, **settings)
    assert not step.accepted
    assert step.candidate_objective > 0.1
    assert step.objective < 1e-20
    assert step.adapters is adapters
    assert step.alpha is alpha
    assert step.bases is bases


def test_a_step_that_raises_the_objective_by_a_trifle_is_rejected():
    """From where Gauss-Newton has settled, a trifle of the way to noise."""
    problem, adapters, alpha, bases, _ = begin()
    for _ in range(60):
        step = am_step(problem, adapters, alpha, bases, normal(E, R, D), bank_update="gauss_newton", **SETTINGS)
        adapters, alpha, bases = step.adapters, step.alpha, step.bases
    noise = float(mix(alpha, bases).std()) * normal(E, R, D, seed=3)
    settings = SETTINGS | {"route_beta": 0.0, "use_weight_aware_targets": False, "step_size": 0.003}
    tried = am_step(problem, adapters, alpha, bases, noise, **settings)
    assert step.objective < tried.candidate_objective < 1.005 * step.objective
    assert not tried.accepted
    assert tried.bases is bases


def test_a_step_that_is_not_finite_is_rejected():
    problem, adapters, alpha, bases, warm = begin()
    settings = SETTINGS | {"route_beta": 0.0, "use_weight_aware_targets": False}
    step = am_step(problem, adapters, alpha, bases, torch.full_like(warm, torch.nan), **settings)
    assert not step.accepted
    assert step.candidate_objective != step.candidate_objective
    assert torch.equal(step.bases, bases)
    assert step.num_fallbacks == E


@pytest.mark.parametrize("num_kept", [1, 2])
@pytest.mark.parametrize("step_size", [1.0, 0.25])
def test_support_is_respected_at_every_step_size(num_kept: int, step_size: float):
    """From a poor support, so that the step is taken and the support changes: codes are never moved part of the way."""
    problem, _, _, bases, warm = begin()
    alpha = normal(E, M, seed=8)
    alpha = alpha * top_mask(alpha, num_kept)
    first = project(problem, alpha, bases, "identity", adapters=True)
    assert first.adapters is not None
    settings = SETTINGS | {"route_beta": 0.0, "use_weight_aware_targets": False, "num_kept": num_kept}
    step = am_step(problem, first.adapters, alpha, bases, warm, step_size=step_size, **settings)
    assert step.accepted
    assert ((step.alpha != 0) != (alpha != 0)).any()
    assert ((step.alpha != 0).sum(1) == num_kept).all()


def test_signed_atoms_are_normalised_and_simplex_codes_keep_their_sum():
    signed = am_step(*begin(), **SETTINGS)
    assert signed.accepted
    torch.testing.assert_close(norms(signed.bases), torch.ones(M, dtype=signed.bases.dtype))
    on_simplex = am_step(*begin("entmax15"), codes="entmax15", **SETTINGS)
    torch.testing.assert_close(on_simplex.alpha.sum(1), torch.ones(E, dtype=on_simplex.alpha.dtype))


def test_adapters_returned_are_exact_in_the_problems_metric():
    metric = InputMetric(second_moment(D)[None], (0,) * (E - 1) + (None,))
    problem, *factors = begin(metric=metric)
    settings = SETTINGS | {"activation": "tanh", "bank_update": "gauss_newton", "step_size": 0.1}
    step = am_step(problem, *factors, **settings)
    assert step.accepted
    features = activate(mix(step.alpha, step.bases), "tanh")
    expected, _ = refit_adapters(problem.weights, features, weighed=problem.weigh(features))
    torch.testing.assert_close(step.adapters, expected)
    assert step.objective == pytest.approx(measured(problem, step, settings), rel=1e-12)


def test_gauss_newton_leaves_the_codes_alone_and_gains_more_than_optimal_directions():
    problem, adapters, alpha, bases, warm = begin()
    step = am_step(problem, adapters, alpha, bases, warm, bank_update="gauss_newton", **SETTINGS)
    share = step.alpha / alpha
    torch.testing.assert_close(share, share[:1].expand_as(share))  # but for the norms of the atoms
    plain = am_step(problem, adapters, alpha, bases, warm, **SETTINGS)
    assert step.accepted
    assert step.objective < plain.candidate_objective
