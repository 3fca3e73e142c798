from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from globe.quant import trellis

METHOD = {2: 0.274, 4: 0.073, 6: 0.020, 8: 0.0054}
"""Squared errors at 2^12 states and whole bits that METHOD.md has from a table of permuted quantiles."""
WIDTHS = range(trellis.LEAST_WIDTH, trellis.MAX_WIDTH + 1)


def normal_rows(n: int, length: int, width: int, seed: int = 0) -> Tensor:
    """Normal rows in units of a level, scaled as their width wants it."""
    x = torch.randn(n, length, generator=torch.Generator().manual_seed(seed))
    return x * (trellis.RMS / trellis.GAIN[width])


def relative_error(x: Tensor, states: Tensor) -> float:
    return float((trellis.levels()[states] - x).square().sum() / x.square().sum())


def begin(t: int, width: int) -> int:
    """The bit of the ring at which entry t begins."""
    return t * width >> 1


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
    x = normal_rows(32, 1024, width, seed=1)
    _, states = trellis.encode(x, width)
    tolerance = 0.03 if width <= 12 else 0.15  # few entries beyond the levels decide
    assert relative_error(x, states) == pytest.approx(trellis.DISTORTION[width], rel=tolerance)


@pytest.mark.parametrize("width", METHOD)
def test_error_is_no_worse_than_the_methods(width: int) -> None:
    assert trellis.DISTORTION[width] < 1.03 * METHOD[width]


@pytest.mark.parametrize("width", WIDTHS)
def test_error_is_above_what_no_code_is_below(width: int) -> None:
    """The rate-distortion function of a normal source: 2^(−2 bits)."""
    assert trellis.DISTORTION[width] > 2.0**-width


@pytest.mark.parametrize("width", [w for w in WIDTHS if w % 2])
def test_half_a_bit_is_worth_half(width: int) -> None:
    more, error, less = trellis.DISTORTION[width - 1 : width + 2]
    assert less < error < more
    if width <= 12:
        assert error == pytest.approx(math.sqrt(less * more), rel=0.03)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_path_is_the_ring_of_its_symbols(width: int) -> None:
    symbols, states = trellis.encode(normal_rows(3, 40, width), width)
    assert symbols.dtype == torch.uint8
    bits = 20 * width
    for row, path in zip(symbols.tolist(), states.tolist(), strict=True):
        ring = 0
        for t, symbol in enumerate(row):
            assert symbol < 2 ** (begin(t + 1, width) - begin(t, width))
            ring |= symbol << begin(t, width)
        turned = ring | ring << bits
        assert path == [(turned >> begin(t, width)) % trellis.NUM_STATES for t in range(40)]
    torch.testing.assert_close(trellis.states(symbols, width), states, rtol=0, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", [trellis.LOG_STATES, 30])
def test_numba_and_torch_find_the_same_paths(width: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal_rows(3, length, width)
    x[0] *= 100  # beyond what the search resolves
    x[1] = 0  # ties
    fast = trellis.encode(x, width)
    without_numba(monkeypatch)
    slow = trellis.encode(x, width)
    torch.testing.assert_close(fast, slow, rtol=0, atol=0)


def least_error(x: Tensor, width: int, levels: Tensor, log_states: int) -> float:
    """Squared error of the best of all rings."""
    bits = len(x) * width // 2
    rings = torch.arange(2**bits)
    turned = rings | rings << bits
    errors = torch.zeros(len(rings), dtype=torch.float64)
    for t, entry in enumerate(x.double()):
        errors += (levels[(turned >> begin(t, width)) % 2**log_states].double() - entry).square()
    return float(errors.min())


@pytest.mark.parametrize("width", [2, 3, 4])
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
        x = normal_rows(1, 24 // width, width, seed)
        _, states = trellis.encode(x, width)
        error = float((levels[states[0]] - x[0]).square().sum())
        exhaustive = least_error(x[0], width, levels, 4)
        assert error >= exhaustive * (1 - 1e-5)
        equal += error <= exhaustive * 1.001
        found, least = found + error, least + exhaustive
    assert found < 1.05 * least
    assert equal >= 14


@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_given_the_closing_the_path_is_the_best(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against dynamic programming in float64 over explicit predecessors, on a small trellis."""
    levels = (torch.randn(32, generator=torch.Generator().manual_seed(1)) * trellis.RMS).round().int()
    small_trellis(monkeypatch, 5, levels)
    length = 20
    x = normal_rows(1, length, width)
    _, states = trellis.encode(x, width)
    closing = states[0].tolist()[-1]
    costs = {closing: 0.0}
    for t in range(length):
        moved = begin(t + length, width) - begin(t + length - 1, width)
        after: dict[int, float] = {}
        for before, cost in costs.items():
            for new in range(2**moved):
                state = (before >> moved) | (new << (5 - moved))
                total = cost + (float(x[0, t]) - int(levels[state])) ** 2
                after[state] = min(after.get(state, math.inf), total)
        costs = after
    error = float((levels[states[0]].double() - x[0].double()).square().sum())
    assert error == pytest.approx(costs[closing], rel=1e-4)
    last = begin(length, width) - begin(length - 1, width)
    same = [cost for state, cost in costs.items() if state >> last == closing >> last]  # that close in the same way
    assert error == pytest.approx(min(same), rel=1e-4)


@pytest.mark.parametrize("width", WIDTHS)
def test_costs_stay_within_32_bits(width: int) -> None:
    """The bound that `fineness` promises, whatever the entries are."""
    bits = max(trellis.entry_bits(width))
    spare = (bits + 1) // 2
    assert 2 * spare >= bits
    farthest = (int(4.5 * trellis.RMS) + int(trellis.levels().abs().max())) * trellis.fineness(width) << spare
    hops = math.ceil(2 * trellis.LOG_STATES / width)
    assert (hops + 1) * farthest**2 <= 2**30


def test_short_and_odd_rows_and_strange_widths_are_refused() -> None:
    for length in (10, 11, 13, 41):
        with pytest.raises(ValueError, match="at least 12 entries, and an even number"):
            trellis.encode(torch.zeros(1, length), 4)
    for width in (0, 1, 17):
        with pytest.raises(ValueError, match="2 to 16 half bits"):
            trellis.encode(torch.zeros(1, 16), width)


def test_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal_rows(7, 64, 3)
    one = trellis.encode(x, 3)
    monkeypatch.setattr(trellis, "_LEAST_PER_THREAD", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(trellis.encode(x, 3), one, rtol=0, atol=0)


@pytest.mark.parametrize(("num_outputs", "length"), [(1, 12), (11, 12), (12, 12), (13, 14), (14, 14), (131, 132)])
def test_paths_are_even_and_long_enough_to_close(num_outputs: int, length: int) -> None:
    assert trellis.path_length(num_outputs) == length
