"""The scheduling of `globe.train.fit_banks`: λ, β, Route-W, temperature and step length."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from globe.train.config import FitConfig
from globe.train.schedule import first_schedule, next_schedule, step_length


def configure(**settings: Any) -> FitConfig:
    return FitConfig(**({"rank": 3, "num_bases": 16, "solver": "am", "activation": "tanh"} | settings))


def run(config: FitConfig, accepted: list[bool], median_support: float = 8.0):
    """The schedules of steps 1, 2, …"""
    schedules = [first_schedule(config)]
    for step, was_accepted in enumerate(accepted, start=1):
        schedules.append(next_schedule(schedules[-1], step, was_accepted, median_support, config))
    return schedules


@given(max_steps=st.integers(1, 60), data=st.data())
def test_homotopy_and_blending_rise_to_one_whatever_is_accepted(max_steps: int, data: st.DataObject):
    accepted = data.draw(st.lists(st.booleans(), min_size=max_steps, max_size=max_steps))
    schedules = run(configure(max_steps=max_steps), accepted)
    for now, after in itertools.pairwise(schedules):
        assert 0 <= now.activation_lambda <= after.activation_lambda <= 1
        assert 0 <= now.route_beta <= after.route_beta <= 1
        assert after.use_weight_aware_targets == (after.route_beta == 1)
    assert all(s.activation_lambda == 1 for s in schedules[max(1, max_steps // 2) :])
    assert all(s.use_weight_aware_targets for s in schedules[max(1, max_steps // 4) :])


def test_am_begins_linear_on_the_warm_starts_targets():
    first = first_schedule(configure())
    assert (first.activation_lambda, first.route_beta, first.use_weight_aware_targets) == (0.0, 0.0, False)
    assert first_schedule(configure(activation="identity")).activation_lambda == 1.0


def test_a_rejected_step_holds_the_nonlinearity_but_not_the_targets():
    config = configure(max_steps=40)
    accepted, rejected = run(config, [True] * 5), run(config, [False] * 5)
    assert [s.activation_lambda for s in accepted] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25])
    assert all(s.activation_lambda == 0 for s in rejected)
    assert [s.route_beta for s in rejected] == [s.route_beta for s in accepted] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_varpro_needs_neither_homotopy_nor_targets():
    for schedule in run(configure(solver="varpro", max_steps=20), [True] * 20):
        assert (schedule.activation_lambda, schedule.route_beta, schedule.temperature) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("solver", ["am", "varpro"])
@pytest.mark.parametrize("median_support", [0.0, 1.0, 4.0, 16.0, 1e6])
def test_temperature_steers_within_its_bounds(solver: str, median_support: float):
    config = configure(solver=solver, codes="entmax15", support=4, max_steps=200, temperature=2.0, min_temperature=0.5)
    temperatures = [s.temperature for s in run(config, [True] * 200, median_support)]
    assert temperatures[0] == 2.0
    assert all(0.5 <= t <= 10.0 for t in temperatures)
    if median_support > 4:
        assert temperatures == sorted(temperatures, reverse=True)
        assert temperatures[-1] == 0.5
    elif median_support < 4:
        assert temperatures == sorted(temperatures)
        assert temperatures[-1] == 10.0
    else:
        assert temperatures == [2.0] * 201


@pytest.mark.parametrize("settings", [{"codes": "ridge", "support": 4}, {"codes": "entmax15"}])
def test_temperature_rests_without_a_support_to_steer_to(settings: dict[str, Any]):
    assert all(s.temperature == 1.0 for s in run(configure(**settings), [True] * 20, 16.0))


@pytest.mark.parametrize("max_steps", [1, 5, 30, 300])
def test_step_length_warms_up_then_falls_towards_zero(max_steps: int):
    lengths = [step_length(step, max_steps) for step in range(1, max_steps + 1)]
    assert all(0 < length <= 1 for length in lengths)
    peak = lengths.index(max(lengths))
    assert peak < 10
    assert lengths[: peak + 1] == sorted(lengths[: peak + 1])
    assert lengths[peak:] == sorted(lengths[peak:], reverse=True)
    if max_steps == 300:
        assert lengths[0] == pytest.approx(0.1)
        assert lengths[9] > 0.99
        assert lengths[150] == pytest.approx(0.5, abs=0.01)
        assert lengths[-1] < 1e-3
