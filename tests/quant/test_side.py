from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from globe.quant.side import LARGEST_SCALE, OwnRows, fit_sum, misfit, parts_of_side, share_costs, share_rows
from globe.quant.sizes import side_bytes
from globe.quant.trellis import LEAST_WIDTH, MAX_WIDTH
from globe.quant.water_fill import UNIT, log_costs, widths_at
from tests.random_experts import normal


def some_own_rows(E: int, N: int) -> tuple[OwnRows, Tensor, Tensor]:
    """With widths and scale exponents (E, N): all of both, where there are inputs enough."""
    widths = torch.tensor([0, *range(LEAST_WIDTH, MAX_WIDTH + 1)]).repeat(E, -(-N // MAX_WIDTH))[:, :N]
    bases = torch.arange(E) * 300 - 7
    exponents = bases[:, None] - torch.arange(N) % (LARGEST_SCALE + 1)
    rows = OwnRows.of(widths.to(torch.uint8), exponents.to(torch.int32), bases.to(torch.int16))
    return rows, widths, exponents


@pytest.mark.parametrize("N", [1, 2, 17, 16 * 256 + 1])
def test_own_rows_hold_every_width_and_scale(N: int) -> None:
    rows, widths, exponents = some_own_rows(3, N)
    assert rows.widths().dtype == torch.uint8
    assert rows.widths().tolist() == widths.tolist()
    has_bits = widths > 0
    assert rows.exponents()[has_bits].tolist() == exponents[has_bits].tolist()
    assert not bool(rows.scales[~has_bits].any())
    assert rows.num_bytes == side_bytes(3, N, is_shared=False) == sum(part.nbytes for part in parts_of_side(rows))


def test_two_widths_are_in_a_byte_and_the_first_is_lower() -> None:
    widths = torch.tensor([[0, 2, 16, 3, 5]], dtype=torch.uint8)
    rows = OwnRows.of(widths, torch.full((1, 5), 4, dtype=torch.int32), torch.tensor([9], dtype=torch.int16))
    assert rows.packed_widths.tolist() == [[0 + 16 * 1, 15 + 16 * 2, 4]]
    assert rows.scales.tolist() == [[0, 5, 5, 5, 5]]


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
    own, _, _ = some_own_rows(5, 9)
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
