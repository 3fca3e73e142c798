from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from globe.quant import trellis

METHOD = {1: 0.274, 2: 0.073, 3: 0.020, 4: 0.0054}
"""Squared errors at 2^12 states that METHOD.md has from a table of permuted quantiles."""
WIDTHS = range(1, trellis.MAX_WIDTH + 1)


def normal_rows(n: int, length: int, width: int, seed: int = 0) -> Tensor:
    """Normal rows in units of a level, scaled as their width wants it."""
    x = torch.randn(n, length, generator=torch.Generator().manual_seed(seed))
    return x * (trellis.RMS / trellis.GAIN[width])


def relative_error(x: Tensor, states: Tensor) -> float:
    return float((trellis.levels()[states] - x).square().sum() / x.square().sum())


def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis, "compiled", lambda: None)


def small_trellis(monkeypatch: pytest.MonkeyPatch, log_states: int, levels: Tensor) -> None:
    """Another L and other levels, searched in torch."""
    without_numba(monkeypatch)
    monkeypatch.setattr(trellis, "LOG_STATES", log_states)
    monkeypatch.setattr(trellis, "NUM_STATES", 2**log_states)
    monkeypatch.setattr(trellis, "levels", lambda device=None: levels)  # noqa: ARG005
    monkeypatch.setattr(trellis, "_scaled_levels", trellis._scaled_levels.__wrapped__)


def test_levels_are_sums_of_bytes() -> None:
    for state in (0, 1, 2, 1000, trellis.NUM_STATES - 1):
        mixed = (state * trellis.MULTIPLIER + trellis.ADDEND) % 2**32
        assert int(trellis.levels()[state]) == sum(mixed.to_bytes(4, "little")) - trellis.MEAN


def test_levels_have_the_moments_that_the_format_says() -> None:
    levels = trellis.levels().double()
    assert abs(float(levels.mean())) < 0.01 * trellis.RMS
    assert float(levels.square().mean().sqrt()) == pytest.approx(trellis.RMS, abs=1e-3)
    assert int(levels.max()) == trellis.LARGEST


@pytest.mark.parametrize("width", WIDTHS)
def test_error_is_that_of_the_format(width: int) -> None:
    if trellis.compiled() is None:
        pytest.skip("minutes without numba")
    x = normal_rows(32, 1024, width, seed=1)
    _, states = trellis.encode(x, width)
    tolerance = 0.03 if width <= 6 else 0.15  # few entries beyond the levels decide
    assert relative_error(x, states) == pytest.approx(trellis.DISTORTION[width], rel=tolerance)


@pytest.mark.parametrize("width", METHOD)
def test_error_is_no_worse_than_the_methods(width: int) -> None:
    assert trellis.DISTORTION[width] < 1.03 * METHOD[width]
    assert trellis.DISTORTION[width] > 4.0**-width


@pytest.mark.parametrize("width", WIDTHS)
def test_a_path_is_the_ring_of_its_symbols(width: int) -> None:
    symbols, states = trellis.encode(normal_rows(3, 40, width), width)
    assert symbols.dtype == torch.uint8
    assert int(symbols.max()) < 2**width
    for row, path in zip(symbols.tolist(), states.tolist(), strict=True):
        ring = sum(symbol << (width * place) for place, symbol in enumerate(row))
        bits = width * len(row)
        for t, state in enumerate(path):
            turned = (ring >> (t * width)) | (ring << (bits - t * width))
            assert state == turned % trellis.NUM_STATES
    torch.testing.assert_close(trellis.states(symbols, width), states, rtol=0, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", [trellis.LOG_STATES, 29])
def test_numba_and_torch_find_the_same_paths(width: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if trellis.compiled() is None:
        pytest.skip("numba is not installed")
    x = normal_rows(3, length, width)
    x[0] *= 100  # beyond what the search resolves
    x[1] = 0  # ties
    fast = trellis.encode(x, width)
    without_numba(monkeypatch)
    slow = trellis.encode(x, width)
    torch.testing.assert_close(fast, slow, rtol=0, atol=0)


def best_path(x: Tensor, width: int, levels: Tensor, log_states: int) -> tuple[float, float]:
    """Least squared error over all rings of symbols, and over those that close as the path with symbols 0 does."""
    costs: list[float] = []
    for symbols in itertools.product(range(2**width), repeat=len(x)):
        ring = sum(symbol << (width * place) for place, symbol in enumerate(symbols))
        ring |= ring << (width * len(x))
        path = [(ring >> (t * width)) % 2**log_states for t in range(len(x))]
        costs.append(float((levels[path] - x).square().sum()))
    return min(costs), costs[0]


@pytest.mark.parametrize("width", [1, 2])
def test_no_ring_is_much_better(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exhaustive search on a small trellis: the closing is found by a heuristic, the rest exactly."""
    levels = torch.special.ndtri((torch.arange(16) + 0.5) / 16)[
        torch.randperm(16, generator=torch.Generator().manual_seed(0))
    ]
    levels = (levels * trellis.RMS).round().int()
    small_trellis(monkeypatch, 4, levels)
    found, least = 0.0, 0.0
    equal = 0
    for seed in range(20):
        x = normal_rows(1, 12 // width, width, seed)
        _, states = trellis.encode(x, width)
        error = float((levels[states[0]] - x[0]).square().sum())
        exhaustive, _ = best_path(x[0], width, levels.float(), 4)
        assert error >= exhaustive * (1 - 1e-5)
        equal += error <= exhaustive * 1.001
        found, least = found + error, least + exhaustive
    assert found < 1.05 * least
    assert equal >= 14


def test_given_the_closing_the_path_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against dynamic programming in float64 over explicit predecessors, all closings tried."""
    levels = (torch.randn(32, generator=torch.Generator().manual_seed(1)) * trellis.RMS).round().int()
    small_trellis(monkeypatch, 5, levels)
    width, length = 2, 20
    x = normal_rows(1, length, width)
    _, states = trellis.encode(x, width)
    path = states[0].tolist()
    closing = path[-1]
    costs = {closing: 0.0}
    for t in range(length):
        after: dict[int, float] = {}
        for before, cost in costs.items():
            for symbol in range(2**width):
                state = (before >> width) | (symbol << (5 - width))
                total = cost + (float(x[0, t]) - int(levels[state])) ** 2
                after[state] = min(after.get(state, math.inf), total)
        costs = after
    error = float((levels[states[0]].double() - x[0].double()).square().sum())
    group = [cost for state, cost in costs.items() if state >> width == closing >> width]
    assert error == pytest.approx(costs[closing], rel=1e-4)
    assert error >= min(group) * (1 - 1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_costs_stay_within_32_bits(width: int) -> None:
    """The bound that `fineness` promises, whatever the entries are."""
    spare = (width + 1) // 2
    assert 2 * spare >= width
    farthest = (int(4.5 * trellis.RMS) + int(trellis.levels().abs().max())) * trellis.fineness(width) << spare
    hops = math.ceil(trellis.LOG_STATES / width)
    assert (hops + 1) * farthest**2 <= 2**30


def test_short_rows_and_strange_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 12 entries"):
        trellis.encode(torch.zeros(1, 11), 2)
    for width in (0, 9):
        with pytest.raises(ValueError, match="1 to 8 bits"):
            trellis.encode(torch.zeros(1, 16), width)


def test_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    if trellis.compiled() is None:
        pytest.skip("numba is not installed")
    x = normal_rows(7, 64, 2)
    one = trellis.encode(x, 2)
    monkeypatch.setattr(trellis, "_LEAST_PER_THREAD", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(trellis.encode(x, 2), one, rtol=0, atol=0)
