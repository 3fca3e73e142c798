from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from globe.bank.objective import InputMetric, Problem, Projection, objective, project
from globe.errors import GlobeError, SettingsError
from globe.init.warm_start import warm_start
from globe.terms import CodeMap, WarmStartName
from globe.train import fit_banks, varpro
from globe.train.config import FitConfig
from globe.train.fit_banks import fit_bank
from globe.train.result import FitResult, StepRecord
from globe.train.varpro import VariableProjection
from tests.random_experts import normal, planted_alignment, second_moment

E, P, D = 10, 6, 16
SOLVERS = ["varpro", "am"]
MAPS = get_args(CodeMap)
WARM_STARTS = get_args(WarmStartName)


@pytest.fixture
def experts() -> Tensor:
    """Experts with something to share, in units unlike 1."""
    return (0.02 * (planted_alignment(E, P, D, P, 4) + 0.5 * normal(E, P, D, seed=5))).float()


def configure(**settings: Any) -> FitConfig:
    return FitConfig(**({"rank": 5, "num_bases": 4, "max_steps": 12, "align_steps": 4} | settings))


def relative_error(experts: Tensor, result: FitResult) -> float:
    return float((experts - result.factors.compose()).double().norm() / experts.double().norm())


def check_record(experts: Tensor, config: FitConfig, result: FitResult) -> None:
    """What holds for every fit, whatever its settings."""
    factors, history = result.factors, result.history
    assert factors.adapters.shape == (E, P, config.rank)
    assert factors.codes.shape == (E, config.num_bases)
    assert factors.bases.shape == (config.num_bases, config.rank, D)
    assert factors.num_parameters == E * P * config.rank + E * config.num_bases + config.num_bases * config.rank * D
    assert all(x.isfinite().all() for x in (factors.adapters, factors.codes, factors.bases))
    assert all(later <= earlier for earlier, later in itertools.pairwise(history))
    assert relative_error(experts, result) == pytest.approx(history[-1], abs=1e-5)
    assert [record.step for record in result.steps] == list(range(len(history)))
    assert len(history) <= config.max_steps + 1
    assert all(math.isfinite(raw) for raw in (record.raw_error for record in result.steps))
    assert sum(result.stats.popularity) == pytest.approx(1, abs=1e-5)
    for record in result.steps:
        assert config.min_temperature <= record.temperature <= config.max_temperature
        assert 0 <= record.activation_lambda <= 1
        assert 0 <= record.route_beta <= 1
        assert 0 <= record.step_size <= 1
        assert -1e-6 <= record.mean_entropy <= math.log(config.num_bases) + 1e-6
        assert 1 <= record.median_support <= config.num_bases
    if config.codes != "ridge":
        assert (factors.codes >= 0).all()
        torch.testing.assert_close(factors.codes.sum(1), torch.ones(E))


# every combination


@pytest.mark.parametrize("codes", MAPS)
@pytest.mark.parametrize("name", WARM_STARTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_warm_start_and_code_map(experts: Tensor, solver: str, name: str, codes: str):
    config = configure(solver=solver, warm_start=name, codes=codes)
    result = fit_bank(experts, config)
    check_record(experts, config, result)
    assert result.history[-1] < result.history[0]
    normalised = experts / experts.square().mean().sqrt()
    start = warm_start(normalised, config.rank, config.num_bases, name, codes=codes, align_steps=4)
    first = project(Problem(normalised), start.codes, start.bases, config.activation).objective ** 0.5
    assert result.history[0] == pytest.approx(first, rel=1e-4)
    assert result.stats.warm_start == pytest.approx(start.metrics, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("activation", ["identity", "silu", "tanh"])
@pytest.mark.parametrize("codes", MAPS)
@pytest.mark.parametrize("support", [None, 1, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_activation_and_support(experts: Tensor, solver: str, support: int | None, codes: str, activation: str):
    config = configure(solver=solver, activation=activation, codes=codes, support=support)
    result = fit_bank(experts, config)
    check_record(experts, config, result)
    assert result.factors.activation == activation
    if support is not None and codes == "ridge":
        assert ((result.factors.codes != 0).sum(1) <= support).all()


# known answers


@pytest.mark.parametrize("name", WARM_STARTS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("codes", ["ridge", "sparsemax"])
def test_exact_when_nothing_is_compressed_away(experts: Tensor, solver: str, name: str, codes: str):
    config = configure(rank=P, num_bases=E, activation="identity", solver=solver, warm_start=name, codes=codes)
    one_atom_short = name == "ts_pca"  # the mean and E − 1 directions about it: the last one has to be learned
    config = dataclasses.replace(config, lambda_a=1e-9, max_steps=300 if one_atom_short else 10)
    result = fit_bank(experts, config)
    check_record(experts, config, result)
    assert relative_error(experts, result) < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_planted_factors_are_found(solver: str):
    experts = planted_alignment(48, 6, 16, 4, 1).float()
    result = fit_bank(experts, configure(rank=4, num_bases=1, activation="identity", solver=solver))
    assert result.history[-1] < 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_shared_bank_beats_truncated_svd_at_equal_parameters(solver: str):
    experts = planted_alignment(32, 8, 24, 8, 3, seed=4) + 0.3 * normal(32, 8, 24, seed=5)
    result = fit_bank(experts, configure(rank=8, num_bases=4, solver=solver, max_steps=60, align_steps=32))
    rank = 3
    assert 32 * rank * (8 + 24) >= result.factors.num_parameters
    dropped = torch.linalg.svdvals(experts)[:, rank:].square().sum()
    assert result.history[-1] < 0.9 * float((dropped / experts.square().sum()).sqrt())


def test_varpro_reaches_what_autograd_and_adam_reach(experts: Tensor):
    """An independent reference: all three factors trained by autograd from the same start, for five times the steps."""
    config = configure(activation="tanh", max_steps=200)
    weights = experts / experts.square().mean().sqrt()
    start = warm_start(weights, config.rank, config.num_bases, align_steps=4)
    first = project(Problem(weights), start.codes, start.bases, "tanh", adapters=True)
    assert first.adapters is not None
    factors = [x.clone().requires_grad_() for x in (first.adapters, start.codes, start.bases)]
    optimiser = torch.optim.Adam(factors, lr=0.01)
    for _ in range(1000):
        optimiser.zero_grad()
        adapters, codes, bases = factors
        what = adapters @ torch.tanh(torch.einsum("em,mrd->erd", codes, bases))
        loss = (weights - what).square().sum() / weights.square().sum()
        loss.backward()
        optimiser.step()
    assert fit_bank(experts, config).history[-1] < 1.05 * float(loss.detach().sqrt())


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_bases_rank_and_support_lower_the_error(experts: Tensor, solver: str):
    def error(**settings: Any) -> float:
        return fit_bank(experts, configure(solver=solver, max_steps=15, **settings)).history[-1]

    assert error(num_bases=6) < error(num_bases=4) < error(num_bases=2)
    assert error(rank=6) < error(rank=4) < error(rank=2)
    assert error() < error(support=1)


# the input and its units


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("codes", ["ridge", "entmax15"])
def test_same_seed_same_bytes(experts: Tensor, solver: str, codes: str):
    config = configure(solver=solver, codes=codes, warm_start="hybrid", seed=7)
    kept = experts.clone()
    torch.manual_seed(1)
    first = fit_bank(experts, config)
    torch.manual_seed(2)
    second = fit_bank(experts, config)
    for name in ("adapters", "codes", "bases"):
        assert torch.equal(getattr(first.factors, name), getattr(second.factors, name))
    assert first.steps == second.steps
    assert torch.equal(experts, kept)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scale_equivariance(experts: Tensor, solver: str):
    config = configure(solver=solver)
    result = fit_bank(experts, config)
    quarter = fit_bank(experts / 4, config)  # a power of 2 rounds nothing
    assert torch.equal(quarter.factors.compose(), result.factors.compose() / 4)
    assert quarter.history == result.history
    thousand = fit_bank(1000 * experts, config)
    torch.testing.assert_close(
        thousand.factors.compose() / 1000, result.factors.compose(), rtol=0, atol=1e-2 * float(experts.std())
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_metric_is_what_the_fit_minimises(experts: Tensor, solver: str):
    metric = InputMetric(second_moment(D)[None] ** 3, (0,) * (E - 2) + (None, None))
    config = FitConfig(rank=4, num_bases=4, solver=solver, max_steps=60, dtype="float64")
    problem = Problem(experts.double(), metric=metric)

    def measured(result: FitResult) -> float:
        factors = result.factors
        return objective(problem, factors.adapters, factors.codes, factors.bases, "tanh") ** 0.5

    found = fit_bank(experts.double(), config, metric=metric)
    assert found.history[-1] == pytest.approx(measured(found), rel=1e-9)
    assert measured(found) < 0.95 * measured(fit_bank(experts.double(), config))


def test_constant_experts_are_not_taken_for_zero():
    result = fit_bank(torch.full((4, 3, 5), 0.5), FitConfig(rank=1, num_bases=1, activation="identity", max_steps=5))
    torch.testing.assert_close(result.factors.compose(), torch.full((4, 3, 5), 0.5))


@pytest.mark.parametrize("solver", SOLVERS)
def test_precision_is_float32_unless_float64_is_asked_for(experts: Tensor, solver: str):
    half = experts.bfloat16()
    result = fit_bank(half, configure(solver=solver))
    assert result.factors.compose().dtype == torch.float32
    double = fit_bank(experts.double(), configure(solver=solver, dtype="float64"))
    assert double.factors.compose().dtype == torch.float64
    missed = (experts.double() - double.factors.compose()).norm() / experts.double().norm()
    assert float(missed) == pytest.approx(double.history[-1], abs=1e-12)
    single = fit_bank(experts, configure(solver=solver))
    assert single.history[-1] == pytest.approx(double.history[-1], rel=1e-2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_experts_that_require_a_gradient_are_fitted_without_one(experts: Tensor, solver: str):
    result = fit_bank(experts.clone().requires_grad_(), configure(solver=solver, codes="entmax15"))
    assert not result.factors.compose().requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("codes", ["ridge", "softmax"])
def test_duplicate_and_zero_experts_are_fitted(experts: Tensor, solver: str, codes: str):
    odd = experts.clone()
    odd[1], odd[3:6] = 0, odd[2]
    config = configure(solver=solver, codes=codes)
    result = fit_bank(odd, config)
    check_record(odd, config, result)
    assert result.factors.compose()[1].abs().max() < 1e-6


# what is refused


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_experts_that_are_not_finite_are_refused(experts: Tensor, poison: float):
    experts[3, 2, 1] = poison
    with pytest.raises(GlobeError, match="NaN or Inf"):
        fit_bank(experts, configure())


@pytest.mark.parametrize("solver", ["varpro", "am"])
def test_zero_experts_are_met_exactly(solver: str):
    seen = list[StepRecord]()
    result = fit_bank(torch.zeros(E, P, D), configure(solver=solver), seen.append)
    factors = result.factors
    assert not any(bool(factor.any()) for factor in (factors.adapters, factors.codes, factors.bases))
    assert factors.compose().shape == (E, P, D)
    assert (result.outcome, result.history) == ("zero", [0.0])
    assert seen == list(result.steps)


@pytest.mark.parametrize("shape", [(P, D), (1, E, P, D)])
def test_anything_but_a_stack_is_refused(shape: tuple[int, ...]):
    with pytest.raises(SettingsError, match=r"experts must be \(E, P, D\); found shape"):
        fit_bank(normal(*shape), configure())


def test_rank_bases_and_warm_start_are_checked_against_the_experts(experts: Tensor):
    with pytest.raises(SettingsError, match="rank 7 exceeds the 6 rows"):
        fit_bank(experts, configure(rank=7))
    with pytest.raises(SettingsError, match="11 bases for 10 experts"):
        fit_bank(experts, configure(num_bases=11))
    with pytest.raises(SettingsError, match="warm_start 'random' is unknown"):
        fit_bank(experts, configure(warm_start="random"))


# steps, support and outcomes


@pytest.mark.parametrize("solver", SOLVERS)
def test_on_step_sees_every_record_in_order(experts: Tensor, solver: str):
    seen = []
    result = fit_bank(experts, configure(solver=solver), on_step=seen.append)
    assert tuple(seen) == result.steps
    assert result.outcome == "max_steps"
    assert len(seen) == 13


@pytest.mark.parametrize("solver", SOLVERS)
def test_history_begins_at_the_warm_start_of_the_support(experts: Tensor, solver: str):
    config = configure(solver=solver, support=2)
    normalised = experts / experts.square().mean().sqrt()
    start = warm_start(normalised, config.rank, config.num_bases, support=2, align_steps=4)
    first = project(Problem(normalised), start.codes, start.bases, "tanh").objective ** 0.5
    assert fit_bank(experts, config).history[0] == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_support_still_improves_on_the_warm_start(experts: Tensor, solver: str, activation: str):
    for steps in (12, 60):
        result = fit_bank(experts, configure(solver=solver, activation=activation, support=2, max_steps=steps))
        assert result.history[-1] < 0.95 * result.history[0]


@pytest.mark.parametrize("target", [1, 3, 6, 10])
@pytest.mark.parametrize("codes", ["entmax15", "sparsemax", "softmax"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_median_support_on_the_simplex_is_within_1_of_its_target(solver: str, codes: str, target: int):
    experts = planted_alignment(32, 6, 16, 6, 6) + 0.3 * normal(32, 6, 16, seed=5)
    config = configure(rank=6, num_bases=10, solver=solver, codes=codes, support=target, max_steps=30)
    result = fit_bank(experts, config)
    assert abs(float((result.factors.codes > 0).sum(1).double().median()) - target) <= 1
    assert result.history[-1] < (0.95 if target > 1 else 1.0) * result.history[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_fit_that_stops_improving_has_converged(experts: Tensor, solver: str):
    config = configure(solver=solver, activation="identity", max_steps=100, tolerance=0.05, patience=10)
    result = fit_bank(experts, config)
    assert result.outcome == "converged"
    assert (26 if solver == "varpro" else 11) < len(result.history) < 101  # long steps need a quarter of all to tell
    assert result.history[-11] - result.history[-1] <= 0.05 * result.history[-11]
    strict = fit_bank(experts, dataclasses.replace(config, tolerance=1e-4))
    assert len(strict.history) > len(result.history)


def test_am_stalls_where_no_step_lowers_the_objective(experts: Tensor, monkeypatch: pytest.MonkeyPatch):
    true_step = fit_banks.am_step

    def refused(problem: Problem, adapters: Tensor, alpha: Tensor, bases: Tensor, *rest: Any, **settings: Any):
        step = true_step(problem, adapters, alpha, bases, *rest, **settings)
        before = objective(problem, adapters, alpha, bases, settings["activation"], settings["activation_lambda"])
        return dataclasses.replace(
            step, adapters=adapters, alpha=alpha, bases=bases, objective=before, candidate_objective=2.0, accepted=False
        )

    monkeypatch.setattr(fit_banks, "am_step", refused)
    result = fit_bank(experts, configure(solver="am", max_steps=40))
    assert result.outcome == "stalled"
    assert len(result.history) == 1 + 5  # at the end of the schedule at once, for nothing is lost by it
    assert result.history == [result.history[0]] * len(result.history)
    assert all(record.step_size == 0 for record in result.steps)
    assert result.stats.num_rejected == len(result.steps) - 1
    assert result.steps[-1].activation_lambda == 1
    assert relative_error(experts, result) == pytest.approx(result.history[-1], abs=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_that_is_not_finite_ends_the_fit_with_the_best_before_it(
    experts: Tensor, solver: str, monkeypatch: pytest.MonkeyPatch
):
    healthy = fit_bank(experts, configure(solver=solver, activation="identity"))
    true_evaluate, true_am_step, count = VariableProjection.evaluate, fit_banks.am_step, itertools.count(0)

    def evaluate(self: VariableProjection) -> Projection:
        found = true_evaluate(self)
        return dataclasses.replace(found, objective=math.nan) if next(count) > 5 else found

    def poisoned(*args: Any, **settings: Any):
        taken = true_am_step(*args, **settings)
        if len(seen) > 5:
            return dataclasses.replace(taken, accepted=False, candidate_objective=math.nan)
        return taken

    seen: list[Any] = []
    monkeypatch.setattr(VariableProjection, "evaluate", evaluate)
    monkeypatch.setattr(fit_banks, "am_step", poisoned)
    result = fit_bank(experts, configure(solver=solver, activation="identity"), on_step=seen.append)
    assert result.outcome == "non_finite"
    assert result.history == healthy.history[:6]
    assert relative_error(experts, result) == pytest.approx(result.history[-1], abs=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_warm_start_that_is_not_finite_is_reported(experts: Tensor, solver: str, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: Any, **settings: Any):
        start = warm_start(*args, **settings)
        return dataclasses.replace(start, bases=start.bases * math.nan)

    monkeypatch.setattr(fit_banks, "warm_start", broken)
    result = fit_bank(experts, configure(solver=solver))
    assert result.outcome == "non_finite"
    assert len(result.history) == 1


def test_varpro_returns_to_the_best_when_it_leaves_the_window(experts: Tensor):
    config = configure(learning_rate=30.0, patience=3, max_steps=40, window=0.05)
    result = fit_bank(experts, config)
    check_record(experts, config, result)
    assert result.stats.num_restarts > 0
    assert max(record.raw_error for record in result.steps) > 1.05 * min(result.history)


def test_the_window_is_one_of_errors(experts: Tensor):
    """As wide as the worst of a fit that never returns to its best, it changes nothing; a little narrower, it does."""
    settings: dict[str, Any] = {"learning_rate": 10.0, "patience": 3, "max_steps": 30}
    free = fit_bank(experts, configure(window=1e3, **settings))
    ratios = [record.raw_error / record.error for record in free.steps[4:]]
    worst = max(ratios) - 1
    assert worst > 0.05
    wide = fit_bank(experts, configure(window=1.01 * worst, **settings))
    assert (wide.stats.num_restarts, wide.history) == (0, free.history)
    assert fit_bank(experts, configure(window=0.95 * worst, **settings)).stats.num_restarts > 0


@pytest.mark.parametrize("seed", range(2))
def test_am_backtracks_and_then_refines_a_step_that_gains_less_than_a_percent(
    experts: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch
):
    """Every call of a fit: optimal directions at 1, 1/2, 1/4 until one is accepted, Gauss-Newton unless it gained."""
    true_step, tries = fit_banks.am_step, list[tuple[str, float, bool, float]]()

    def watched(problem: Problem, adapters: Tensor, alpha: Tensor, bases: Tensor, *rest: Any, **settings: Any):
        before = objective(problem, adapters, alpha, bases, settings["activation"], settings["activation_lambda"])
        taken = true_step(problem, adapters, alpha, bases, *rest, **settings)
        tries.append((settings["bank_update"], settings["step_size"], taken.accepted, taken.objective / before))
        return taken

    monkeypatch.setattr(fit_banks, "am_step", watched)
    noise = normal(E, P, D, seed=20 + seed).float() * experts.std()
    fit_bank(experts + noise, configure(solver="am", max_steps=20))
    steps: list[list[tuple[str, float, bool, float]]] = []
    for tried in tries:
        if tried[:2] == ("optimal_directions", 1.0):
            steps.append([])
        steps[-1].append(tried)
    seen = set[float]()
    for step in steps:
        plain = [tried for tried in step if tried[0] == "optimal_directions"]
        refined = step[len(plain) :]
        sizes = [tried[1] for tried in plain]
        assert sizes == [1.0, 0.5, 0.25][: len(sizes)]
        assert plain[-1][2] or len(plain) == 3
        assert not any(tried[2] for tried in plain[:-1])
        assert bool(refined) == (not plain[-1][2] or plain[-1][3] > 0.99)
        seen |= set(sizes)
    assert seen == {1.0, 0.5, 0.25}


def test_fallbacks_are_counted(experts: Tensor, monkeypatch: pytest.MonkeyPatch):
    true_project = varpro.project

    def counting(*args: Any, **settings: Any):
        return dataclasses.replace(true_project(*args, **settings), num_fallbacks=3)

    assert fit_bank(experts, configure()).stats.num_fallbacks == 0
    monkeypatch.setattr(varpro, "project", counting)
    result = fit_bank(experts, configure())
    assert result.stats.num_restarts == 0
    assert result.stats.num_fallbacks == 3 * len(result.steps)  # each step evaluates once
