from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from globe.bank.factors import mix
from globe.bank.objective import Problem, project
from globe.errors import GlobeError, SettingsError
from globe.train.config import FitConfig
from globe.train.fit_banks import fit_bank
from globe.train.parts import ExpertParts
from globe.train.result import StepRecord
from globe.train.schedule import step_length
from globe.train.stream import State, fit_parts
from globe.train.varpro import VariableProjection
from tests.plain_alternation import plain_alternation
from tests.random_experts import normal, planted_alignment

P, D = 8, 24
SIZES = (16, 24, 24)


@pytest.fixture
def experts() -> Tensor:
    weights = planted_alignment(64, P, D, P, 8) + 0.3 * normal(64, P, D, seed=3)
    return (weights / weights.std()).float()


def split(experts: Tensor) -> ExpertParts:
    places = [sum(SIZES[:count]) for count in range(len(SIZES) + 1)]
    return ExpertParts(SIZES, P, D, lambda index: Problem(experts[places[index] : places[index + 1]].clone()))


def configure(**settings: object) -> FitConfig:
    return FitConfig(**({"rank": 7, "num_bases": 12, "max_steps": 40, "align_steps": 16} | settings))  # pyright: ignore


def test_it_ends_near_the_fit_that_sees_all_experts_at_once(experts: Tensor):
    whole, streamed = fit_bank(experts, configure()), fit_parts(split(experts), configure())
    assert streamed.history[-1] < 1.1 * whole.history[-1]
    assert streamed.history[-1] < 0.8 * streamed.history[0]


def test_the_steps_are_those_of_all_experts_at_once(experts: Tensor):
    whole = ExpertParts((64,), P, D, lambda _: Problem(experts.clone()))
    one, three = fit_parts(whole, configure(max_steps=8)), fit_parts(split(experts), configure(max_steps=8))
    assert three.history == pytest.approx(one.history, rel=1e-3)


def test_the_steps_are_those_of_the_solver_in_memory(experts: Tensor):
    """From where the alignment ended, its mixtures brought to their starting deviation."""
    config, states = configure(max_steps=12, align_steps=5), list[State]()
    result = fit_parts(
        split(experts), config, save=lambda state: states.append({k: v.clone() for k, v in state.items()})
    )
    codes, bases = states[4]["codes"], states[4]["bases"]
    bases = bases * (0.5 / mix(codes, bases).std())
    whole = ExpertParts.in_memory(Problem(experts))
    solver = VariableProjection(whole, codes, bases, "tanh", "ridge", config.learning_rate, 1.0, energy=whole.energy())
    errors = [solver.evaluate().objective ** 0.5]
    for step in range(1, 13):
        solver.move(step_length(step, 12), 1.0)
        errors.append(solver.evaluate().objective ** 0.5)
    assert [record.raw_error for record in result.steps] == pytest.approx(errors, rel=1e-3)


def test_the_seed_decides_where_the_alignment_begins(experts: Tensor):
    first, other = (fit_parts(split(experts), configure(max_steps=1, align_steps=1, seed=seed)) for seed in (0, 1))
    assert first.history[0] != other.history[0]


def test_the_last_error_is_that_of_the_factors_returned(experts: Tensor):
    result = fit_parts(split(experts), configure(max_steps=6))
    assert len(result.history) == 7
    codes, bases = result.factors.codes, result.factors.bases
    assert result.history[-1] == pytest.approx(project(Problem(experts), codes, bases, "tanh").objective ** 0.5)


def test_it_goes_on_from_any_pass_to_the_same_bytes(experts: Tensor):
    config, states = configure(max_steps=5, align_steps=3), list[State]()

    def save(state: State) -> None:
        states.append({name: value.clone() for name, value in state.items()})

    whole = fit_parts(split(experts), config, save=save)
    assert len(states) == 3 + 5  # after each pass of the alignment, and each move
    for state in states:
        again = fit_parts(split(experts), config, state=state)
        assert torch.equal(again.factors.bases, whole.factors.bases)
        assert torch.equal(again.factors.codes, whole.factors.codes)
        assert again.history == whole.history


def test_records_begin_at_the_warm_start_and_the_error_never_rises(experts: Tensor):
    config, seen = configure(learning_rate=8.0, patience=3, window=0.05), list[StepRecord]()
    result = fit_parts(split(experts), config, seen.append)
    assert tuple(seen) == result.steps
    assert [record.step for record in seen] == list(range(config.max_steps + 1))
    assert seen[0].step_size == 0
    assert all(record.step_size > 0 for record in seen[1:-1])
    assert all(later <= earlier for earlier, later in itertools.pairwise(result.history))
    assert any(later.raw_error > earlier.raw_error for earlier, later in itertools.pairwise(seen))  # but iterates do
    assert result.stats.num_restarts > 0
    assert sum(result.stats.popularity) == pytest.approx(1, abs=1e-5)
    assert set(result.stats.warm_start) == {"alignment_error"}


def test_it_goes_on_to_the_same_bytes_after_returns_to_the_best(experts: Tensor):
    config, states = configure(learning_rate=8.0, patience=3, window=0.05, align_steps=3), list[State]()
    whole = fit_parts(split(experts), config, save=lambda s: states.append({k: v.clone() for k, v in s.items()}))
    assert whole.stats.num_restarts > 0
    for state in states[8::7]:
        again = fit_parts(split(experts), config, state=state)
        assert torch.equal(again.factors.bases, whole.factors.bases)
        assert (again.steps, again.stats) == (whole.steps, whole.stats)


def test_the_alignment_ends_where_plain_alternation_in_memory_does(experts: Tensor):
    """Orthogonal iteration against eigenvectors of the E x E Gram matrix."""
    states = list[State]()
    fit_parts(split(experts), configure(align_steps=30, max_steps=1), save=states.append)
    assert float(states[-1]["alignment"][-1]) < 1.03 * plain_alternation(experts, 7, 12, 30)[-1]


def test_the_alignment_never_gets_worse(experts: Tensor):
    states = list[State]()
    fit_parts(split(experts), configure(align_steps=12, max_steps=1), save=states.append)
    errors = states[-1]["alignment"].tolist()
    assert len(errors) == 12
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("settings", [{"solver": "am"}, {"codes": "softmax"}, {"support": 2}, {"warm_start": "svd"}])
def test_what_cannot_be_streamed_is_refused(experts: Tensor, settings: dict[str, object]):
    with pytest.raises(SettingsError, match="streamed with the solver varpro"):
        fit_parts(split(experts), configure(**settings))


def test_experts_that_are_not_finite_are_refused(experts: Tensor):
    with pytest.raises(GlobeError, match="NaN or Inf"):
        fit_parts(split(experts.clone().fill_(torch.nan)), configure())


def test_zero_experts_are_met_exactly(experts: Tensor):
    result = fit_parts(split(torch.zeros_like(experts)), configure())
    assert (result.outcome, result.history) == ("zero", [0.0])
    assert result.factors.codes.shape == (64, 12)
    assert not result.factors.codes.any()
    assert result.factors.bases.shape == (12, 7, D)
    assert not result.factors.bases.any()
