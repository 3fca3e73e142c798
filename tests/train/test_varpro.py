from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from globe.bank.codes import CODE_FLOOR, on_simplex, prune, simplex_preimage, support, top_mask
from globe.bank.objective import Problem, project
from globe.init.warm_start import warm_start
from globe.train.parts import ExpertParts
from globe.train.varpro import FIRST_DECAY, SECOND_DECAY, Accelerated, VariableProjection
from tests.random_experts import normal, simplex

E, P, D, R, M = 8, 5, 9, 4, 3
MAPS = ["ridge", "entmax15", "sparsemax", "softmax"]


def begin(code_map: str, activation: str = "tanh", learning_rate: float = 0.5, temperature: float = 1.0):
    problem = Problem(normal(E, P, D))
    start = warm_start(problem.weights, R, M, codes=code_map, align_steps=2)
    solver = solver_of(problem, start.codes, start.bases, activation, code_map, learning_rate, temperature)
    return problem, start, solver


def solver_of(problem: Problem, codes: Tensor, bases: Tensor, *settings: Any, **more: Any) -> VariableProjection:
    """At these factors, which stay as they are; the solver moves its own bases."""
    parts, energy = ExpertParts.in_memory(problem), float(problem.energy())
    return VariableProjection(parts, codes, bases.clone(), *settings, energy=energy, **more)


def step(solver: VariableProjection, length: float, temperature: float) -> float:
    """Evaluate and move; the objective before."""
    objective = solver.evaluate().objective
    solver.move(length, temperature)
    return objective


def test_the_accelerated_step_is_adams():
    """Against torch.optim.Adam at its betas, with a length that changes from step to step."""
    start, scale = normal(4, 3), 0.3
    mine = Accelerated(start.clone(), scale)
    theirs = start.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=scale, betas=(FIRST_DECAY, SECOND_DECAY), eps=1e-300)
    for step in range(1, 12):
        gradient, length = normal(4, 3, seed=step), 1 / step
        mine.step(gradient, length)
        adam.param_groups[0]["lr"] = scale * length
        theirs.grad = gradient
        adam.step()
        torch.testing.assert_close(mine.value, theirs.detach())
    mine.restart(start)
    assert torch.equal(mine.value, start)
    mine.step(gradient, 1.0)
    torch.testing.assert_close(mine.value, start - scale * gradient.sign())  # a first step knows no past


def test_a_zero_gradient_moves_nothing():
    factor = Accelerated(normal(4, 3), 0.5)
    factor.step(torch.zeros(4, 3, dtype=torch.float64), 1.0)
    assert torch.equal(factor.value, normal(4, 3))


@pytest.mark.parametrize("code_map", MAPS)
@pytest.mark.parametrize("activation", ["identity", "silu", "tanh"])
def test_small_steps_lower_the_objective(code_map: str, activation: str):
    _, _, solver = begin(code_map, activation)
    objectives = [step(solver, 0.02, 1.0) for _ in range(8)]
    objectives.append(solver.evaluate().objective)
    assert objectives[1] < objectives[0]
    assert objectives[-1] < objectives[1]


@pytest.mark.parametrize("code_map", MAPS)
def test_the_objective_is_that_of_the_present_factors(code_map: str):
    problem, start, solver = begin(code_map)
    assert solver.evaluate().objective == project(problem, start.codes, start.bases, "tanh").objective
    for _ in range(3):
        step(solver, 0.3, 1.0)
        assert solver.evaluate().objective == project(problem, solver.codes, solver.bases, "tanh").objective
        if code_map != "ridge":
            assert (solver.codes >= 0).all()
            torch.testing.assert_close(solver.codes.sum(1), torch.ones(E, dtype=torch.float64))


@pytest.mark.parametrize("code_map", MAPS)
def test_the_codes_of_the_start_are_left_alone(code_map: str):
    _, start, solver = begin(code_map)
    codes = start.codes.clone()
    step(solver, 1.0, 1.0)
    assert torch.equal(start.codes, codes)
    assert not torch.equal(solver.codes, codes)
    assert not torch.equal(solver.bases, start.bases)


@pytest.mark.parametrize("code_map", MAPS)
def test_parts_give_what_all_experts_at_once_give(code_map: str):
    problem, start, whole = begin(code_map)
    pieces = [slice(0, 3), slice(3, 4), slice(4, E)]
    parts = ExpertParts([3, 1, 4], P, D, lambda index: Problem(problem.weights[pieces[index]]))
    assert parts.energy() == pytest.approx(float(problem.energy()))
    settings = ("tanh", code_map, 0.5, 1.0)
    split = VariableProjection(parts, start.codes, start.bases.clone(), *settings, energy=parts.energy())
    for _ in range(4):
        assert step(split, 0.3, 1.0) == pytest.approx(step(whole, 0.3, 1.0), rel=1e-9)
    torch.testing.assert_close(split.codes, whole.codes)
    torch.testing.assert_close(split.bases, whole.bases)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("code_map", MAPS)
def test_a_step_of_no_length_stays_at_the_start(code_map: str, temperature: float):
    """The scores begin where map(z / T), pruned as ever, is the warm start's codes, at any temperature."""
    _, start, solver = begin(code_map, temperature=temperature)
    step(solver, 0.0, temperature)
    expected = start.codes if code_map == "ridge" else prune(start.codes, CODE_FLOOR)
    torch.testing.assert_close(solver.codes, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(solver.bases, start.bases)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("code_map", ["entmax15", "softmax"])
def test_scores_follow_the_gradient_through_the_map(code_map: str, temperature: float):
    """The first accelerated step is sign descent: on every score whose slope is not 0, against finite differences."""
    problem = Problem(normal(E, P, D))
    codes, bases = simplex(E, M), normal(M, R, D, seed=3)
    scores = simplex_preimage(codes, code_map) * temperature
    solver = solver_of(problem, codes, bases, "tanh", code_map, 1e-4, temperature)
    step(solver, 1.0, temperature)

    def value(z: Tensor) -> float:
        return project(problem, on_simplex(z / temperature, code_map), bases, "tanh").objective

    slope = torch.empty_like(scores)
    for index in range(scores.numel()):
        bump = torch.zeros_like(scores)
        bump.view(-1)[index] = 1e-6
        slope.view(-1)[index] = (value(scores + bump) - value(scores - bump)) / 2e-6
    expected = on_simplex((scores - 1e-4 * scores.std() * slope.sign()) / temperature, code_map)
    certain = (slope.abs() > 1e-6).all(1)
    assert certain.sum() > E // 2
    torch.testing.assert_close(solver.codes[certain], expected[certain], rtol=1e-9, atol=1e-12)


def test_a_fixed_support_stays_what_it_was():
    problem, start, _ = begin("ridge")
    codes = start.codes * top_mask(start.codes, 2)
    solver = solver_of(problem, codes, start.bases, "tanh", "ridge", 0.5, 1.0, fixed_support=True)
    for _ in range(3):
        step(solver, 0.3, 1.0)
        assert torch.equal(solver.codes != 0, codes != 0)
    assert (support(solver.codes) == 2).all()
    free = solver_of(problem, codes, start.bases, "tanh", "ridge", 0.5, 1.0)
    step(free, 0.3, 1.0)
    assert (support(free.codes) == M).all()


@pytest.mark.parametrize("code_map", MAPS)
def test_restart_returns_to_the_factors_and_forgets_the_past(code_map: str):
    problem, start, solver = begin(code_map)
    for _ in range(4):
        step(solver, 0.5, 1.0)
    solver.evaluate()
    solver.restart(start.codes, start.bases, 1.0)
    torch.testing.assert_close(solver.codes, start.codes)
    first = project(problem, start.codes, start.bases, "tanh").objective
    solver.move(0.1, 1.0)  # along the gradient at the factors that it returned to
    _, _, fresh = begin(code_map)
    assert step(fresh, 0.1, 1.0) == pytest.approx(first, rel=1e-9)
    found = solver.evaluate().objective
    assert found == pytest.approx(fresh.evaluate().objective, rel=1e-6)
    assert math.isfinite(found)


def test_the_rows_of_a_basis_share_their_second_moments():
    """A first step knows no past: each entry moves by its gradient over the root mean square of its column."""
    start, gradient = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    factor = Accelerated(start.clone(), 0.2)
    factor.step(gradient, 0.5)
    expected = start - 0.1 * gradient / gradient.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(factor.value, expected)
    assert factor.second.numel() == 3 * 5


@pytest.mark.parametrize("code_map", MAPS)
def test_a_first_step_is_as_many_deviations_of_each_factor_as_its_length_says(code_map: str):
    """Codes or scores by their sign, bases by their share of a column's root mean square, in whatever units."""
    codes, bases = (normal(E, M) if code_map == "ridge" else simplex(E, M)), normal(M, R, D, seed=3)
    rate, length = 1e-3, 0.25
    for unit in (1.0, 20.0):
        given = codes / unit if code_map == "ridge" else codes
        solver = solver_of(Problem(normal(E, P, D)), given, unit * bases, "tanh", code_map, rate, 1.0)
        scores = solver._scores.value.clone()
        step(solver, length, 1.0)
        moved = (solver._scores.value - scores).abs()
        expected = rate * length * float(scores.std())
        # where a score has a slope at all
        torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], expected), rtol=1e-6, atol=0)
        assert (moved > 0).sum() > moved.numel() / 2
        columns = (solver.bases - unit * bases).square().mean(1).sqrt()
        expected = rate * length * unit * float(bases.std())
        torch.testing.assert_close(columns, torch.full_like(columns, expected), rtol=1e-6, atol=0)


def test_codes_that_are_all_alike_still_move():
    """Their deviation is 0; a thousandth is taken for it."""
    codes, bases = torch.full((E, M), 0.5, dtype=torch.float64), normal(M, R, D, seed=3)
    solver = solver_of(Problem(normal(E, P, D)), codes, bases, "tanh", "ridge", 0.1, 1.0)
    step(solver, 1.0, 1.0)
    torch.testing.assert_close((solver.codes - codes).abs(), torch.full_like(codes, 1e-4))


def test_the_decays_are_what_was_measured():
    """See docs/log.md: whoever measures anew changes both."""
    assert (FIRST_DECAY, SECOND_DECAY) == (0.85, 0.9)
