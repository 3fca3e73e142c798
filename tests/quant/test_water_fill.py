from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from globe.quant.trellis import DISTORTION, MAX_WIDTH
from globe.quant.water_fill import HIGHEST, LOWEST, THRESHOLDS, UNIT, Rows, log_costs, water_fill, widths_at


def random_costs(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.exp(spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def gains(cost: float) -> list[float]:
    """What a row gains by each half bit, per bit; by the first two, which it gets together, on average."""
    errors = [cost * error for error in DISTORTION]
    return [errors[0] - errors[2]] * 2 + [2 * (errors[w] - errors[w + 1]) for w in range(2, MAX_WIDTH)]


def test_every_half_bit_gains_less_than_the_one_before() -> None:
    assert [round(-UNIT * math.log2(gain)) for gain in gains(1.0)[1:]] == list(THRESHOLDS)
    assert list(THRESHOLDS) == sorted(set(THRESHOLDS))
    assert len(THRESHOLDS) == MAX_WIDTH - 1


@given(seed=st.integers(0, 50), multiplier=st.integers(-4000, 4000))
def test_a_row_has_the_half_bits_that_gain_the_multiplier(seed: int, multiplier: int) -> None:
    costs = random_costs(20, seed=seed)
    widths = widths_at(log_costs(costs), multiplier)
    for cost, width in zip(costs.tolist(), widths.tolist(), strict=True):
        reached = [gain / 2 ** (multiplier / UNIT) for gain in gains(cost)]
        assert sum(gain >= 1.005 for gain in reached) <= width <= sum(gain >= 0.995 for gain in reached)


def test_no_other_widths_lose_less_with_as_many_bits() -> None:
    """Against dynamic programming over all of them."""
    costs = random_costs(40)
    filled = water_fill([Rows(log_costs(costs), 8)], 100)
    widths = widths_at(log_costs(costs), filled.multiplier).tolist()
    least = [0.0] + [math.inf] * sum(widths)
    for cost in costs.tolist():
        least = [
            min(least[spent - w] + cost * DISTORTION[w] for w in (0, *range(2, MAX_WIDTH + 1)) if w <= spent)
            for spent in range(len(least))
        ]
    assert 1 in [width % 2 for width in widths]
    loss = sum(cost * DISTORTION[width] for cost, width in zip(costs.tolist(), widths, strict=True))
    assert loss == pytest.approx(min(least), rel=1e-3)


@given(seed=st.integers(0, 50), bits=st.floats(0.2, 7.5))
def test_the_budget_is_spent_and_not_exceeded(seed: int, bits: float) -> None:
    groups = [
        Rows(log_costs(random_costs(8, 300, seed=seed)), 48),
        Rows(log_costs(random_costs(8, 48, seed=seed + 1) * 5), 128),
    ]
    entries = 8 * 300 * 48 + 8 * 48 * 128
    budget = int(entries * bits / 8)
    filled = water_fill(groups, budget)
    assert filled.num_bytes == sum(group.num_bytes(filled.multiplier) for group in groups)
    assert filled.num_bytes + filled.spare == budget
    assert 0 <= filled.spare <= max(0.005 * budget, 256)
    assert sum(group.num_bytes(filled.multiplier - 1) for group in groups) > budget or bits > 7.4


def test_at_high_rates_it_is_the_closed_form() -> None:
    """b = ½ log₂(c / θ) but for rounding: Cover and Thomas, section 10.3.3."""
    costs = random_costs(4000, spread=0.8)
    filled = water_fill([Rows(log_costs(costs), 64)], 4000 * 64 * 4 // 8)
    bits = widths_at(log_costs(costs), filled.multiplier).double() / 2
    ideal = 4 + 0.5 * (costs.double().log2() - costs.double().log2().mean())
    assert float((bits - ideal).abs().max()) < 0.4
    assert float((bits - ideal).mean()) == pytest.approx(0, abs=0.05)


def test_all_or_nothing_at_the_ends() -> None:
    rows = Rows(log_costs(random_costs(10)), 16)
    assert water_fill([rows], 0).num_bytes == 0
    assert water_fill([rows], 10**6).num_bytes == 10 * 16
    with pytest.raises(ValueError, match="-1 bytes"):
        water_fill([rows], -1)


def test_logs_are_kept_in_range() -> None:
    assert log_costs(torch.tensor([0.0, 1.0, 2.0, 1e-38])).tolist()[:3] == [LOWEST, 0, UNIT]
    assert int(log_costs(torch.tensor([1e300], dtype=torch.float64))) == HIGHEST or math.log2(1e300) * UNIT < HIGHEST
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            log_costs(torch.tensor([1.0, bad]))
