from __future__ import annotations

import math

import pytest
import torch

from globe.quant.side import SCALES_PER_WIDTH, OwnRows, fit_sum, misfit, share_costs, share_rows, side_bytes
from globe.quant.trellis import MAX_WIDTH
from globe.quant.water_fill import UNIT, log_costs, widths_at
from tests.random_experts import normal


def test_marks_hold_every_width_and_scale() -> None:
    marks = torch.arange(1 + MAX_WIDTH * SCALES_PER_WIDTH).to(torch.uint8)[None]
    rows = OwnRows(marks, torch.tensor([7], dtype=torch.int16))
    assert marks.numel() <= 256
    assert int(rows.widths()[0, 0]) == 0
    found = list(zip(rows.widths()[0, 1:].tolist(), rows.exponents()[0, 1:].tolist(), strict=True))
    assert found == [(width, 7 - k) for width in range(1, MAX_WIDTH + 1) for k in range(SCALES_PER_WIDTH)]
    assert rows.num_bytes == side_bytes(1, marks.numel(), is_shared=False) == marks.numel() + 2


def test_sums_are_fitted_exactly_where_they_are_sums() -> None:
    u, v = normal(5), normal(7)
    x = u[:, None] + v
    for weights in (None, torch.ones(5, 7), (normal(5, 7) > 0).double()):
        found = fit_sum(x, weights, rounds=200)
        torch.testing.assert_close(found[0][:, None] + found[1], x, rtol=0, atol=1e-3)


def test_sums_are_least_squares() -> None:
    x, weights = normal(4, 6), normal(4, 6, seed=1).square()
    u, v = fit_sum(x, weights, rounds=500)
    design = torch.zeros(4, 6, 10, dtype=x.dtype)
    for e in range(4):
        design[e, :, e] = 1
    for i in range(6):
        design[:, i, 4 + i] = 1
    root = weights.sqrt().flatten()
    best = torch.linalg.lstsq(design.view(24, 10) * root[:, None], x.flatten() * root, driver="gelsd").solution
    wanted = (design.view(24, 10) @ best).view(4, 6)
    torch.testing.assert_close(u[:, None] + v, wanted, rtol=0, atol=1e-4)


def test_shared_rows_have_the_widths_of_their_sums() -> None:
    costs = share_costs((normal(5, 9) * 3 * UNIT).round().int())
    exponents = (normal(5, 1, seed=2) * 10 + normal(9, seed=3) * 10).round().int()
    for multiplier in (-500, 0, 731):
        rows = share_rows(costs, multiplier, exponents)
        torch.testing.assert_close(rows.widths(), widths_at(costs.total(), multiplier), rtol=0, atol=0)
        assert int((rows.exponents() - exponents)[rows.widths() > 0].abs().max()) <= 2
        assert rows.num_bytes == side_bytes(5, 9, is_shared=True) == 4 * 5 + 3 * 9


def test_chosen_experts_keep_their_rows() -> None:
    costs = share_costs((normal(5, 9) * 3 * UNIT).round().int())
    shared = share_rows(costs, 0, torch.zeros(5, 9, dtype=torch.int32))
    own = OwnRows(torch.arange(45).view(5, 9).to(torch.uint8), torch.arange(5).to(torch.int16))
    some = torch.tensor([4, 0, 4])
    for rows in (shared, own):
        torch.testing.assert_close(rows[some].widths(), rows.widths()[some], rtol=0, atol=0)
        torch.testing.assert_close(rows[some].exponents(), rows.exponents()[some], rtol=0, atol=0)


def test_rows_lose_what_the_distance_from_sums_costs() -> None:
    """Against a loop: of a table, what is nearest to sums is row's mean + column's mean − mean of all."""
    costs, mean_squares = normal(5, 9).exp(), normal(5, 9, seed=1).exp()
    expected = 0.0
    for table, price in ((costs, math.log(4) / 2), (mean_squares, 1.6)):
        halves = [[math.log2(x) / 2 for x in row] for row in table.tolist()]  # of energies: octaves of amplitude
        rows = [sum(row) / 9 for row in halves]
        columns = [sum(row[i] for row in halves) / 5 for i in range(9)]
        mean = sum(rows) / 5
        off = [halves[e][i] - rows[e] - columns[i] + mean for e in range(5) for i in range(9)]
        expected += price * sum(x * x for x in off) / 45
    assert misfit(log_costs(costs), mean_squares.float()) == pytest.approx(expected, rel=1e-2)


def test_products_lose_nothing_by_sharing() -> None:
    mean_squares = normal(5, 1).exp() * normal(9, seed=1).exp()
    assert misfit(log_costs(3 * mean_squares), mean_squares) < 1e-4
    assert misfit(log_costs(torch.zeros(5, 9)), torch.zeros(5, 9)) == 0
    one = mean_squares.clone()
    one[2, 3] *= 4
    off = 1 - 1 / 5 - 1 / 9 + 1 / 45  # of what is added to one entry, the share that no sum takes up, on average of all
    assert misfit(log_costs(one), one) == pytest.approx((math.log(4) / 2 + 1.6) * off / 45, rel=2e-2)
