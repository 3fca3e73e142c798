"""Scales and rotation of outputs, against the float64 matrices that they are and the least that scales can cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from globe.quant.outputs import MOST_STEPS, Outputs, block_length, fit_outputs, rotate
from tests.random_experts import F64, normal

E, N, K = 3, 40, 12


def rotation(num_outputs: int) -> Tensor:
    """The matrix entry by entry: a sign of the row's, (−1)^(bits that both places in a block have), and the reflection
    of the blocks at their mean."""
    length = math.gcd(num_outputs, 2**20)
    count = num_outputs // length
    found = torch.zeros(num_outputs, num_outputs, dtype=F64)
    for k in range(num_outputs):
        sign = -1 if (k + 1) * 2654435761 % 2**32 >= 2**31 else 1
        for j in range(num_outputs):
            within = (-1) ** (k % length & j % length).bit_count() / math.sqrt(length)
            across = (k // length == j // length) - (2 / count if count > 1 else 0)
            found[k, j] = sign * within * across
    return found


def fitted(X: Tensor, weights: Tensor) -> Outputs:
    return fit_outputs(X.square().mean(1), X.shape[1], weights)


def uneven(seed: int = 0, spread: float = 2.0, num_outputs: int = K) -> tuple[Tensor, Tensor]:
    """X (E, N, K) and weights (E, K), float32, of outputs of many sizes and worths."""
    X = normal(E, N, num_outputs, seed=seed) * (spread * normal(E, 1, num_outputs, seed=seed + 1)).exp()
    return X.float(), (spread * normal(E, num_outputs, seed=seed + 2)).exp().float()


def cost(X: Tensor, weights: Tensor, exponents: Tensor | None) -> Tensor:
    """(E,): of errors in proportion to the energy of the scaled outputs, spread evenly over them."""
    squares = torch.ones(weights.shape, dtype=F64) if exponents is None else 2.0 ** exponents.double()
    mean_squares = X.double().square().mean(1)
    return (weights.double() / squares).mean(1) * (squares * mean_squares).mean(1)


@pytest.mark.parametrize("num_outputs", [1, 3, 5, 12, 48, 64, 192])
def test_the_rotation_is_its_matrix_and_orthogonal(num_outputs: int) -> None:
    matrix = rotation(num_outputs)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(num_outputs, dtype=F64))
    x = normal(2, 5, num_outputs)
    torch.testing.assert_close(rotate(x), x @ matrix)
    torch.testing.assert_close(Outputs().undo(x.clone()), x @ matrix.T)
    torch.testing.assert_close(Outputs().undo(rotate(x.float())), x.float())
    assert rotate(x[:0]).shape == (0, 5, num_outputs)


def test_every_entry_is_spread_over_its_block_and_the_others() -> None:
    assert [block_length(each) for each in (1, 7, 48, 64)] == [1, 1, 16, 64]
    assert bool((rotate(torch.eye(64)).abs() == 1 / 8).all())
    blocks = rotate(torch.eye(48)).view(3, 16, 3, 16).abs()
    for start in range(3):
        for end in range(3):
            wanted = torch.full((16, 16), 0.25 * (1 if start == end else 2) / 3)
            torch.testing.assert_close(blocks[start, :, end], wanted)
    first = rotate(torch.eye(48))[:16, 0]
    assert 0 < float((first > 0).float().mean()) < 1


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("num_outputs", [1, 7, 12, 32])
def test_what_is_done_is_a_product_of_matrices_and_is_undone(num_outputs: int, is_scaled: bool) -> None:
    X = normal(E, N, num_outputs).float()
    steps = torch.randint(-4, 5, (E, num_outputs), generator=torch.Generator().manual_seed(1))
    outputs = Outputs(steps.to(torch.int8) if is_scaled else None)
    assert outputs.num_bytes == is_scaled * E * num_outputs
    diagonal = 2.0 ** (is_scaled * steps.double() / 2)
    before = X.clone()
    rows = outputs.apply(X)
    torch.testing.assert_close(rows.double(), X * diagonal[:, None] @ rotation(num_outputs), rtol=1e-5, atol=1e-5)
    assert torch.equal(X, before)
    some = torch.tensor([2, 0, 2])
    undone_some, undone = outputs.undo(rows[some], some), outputs.undo(rows)
    torch.testing.assert_close(undone, X, rtol=1e-5, atol=1e-5)
    assert torch.equal(undone_some, undone[some])


def test_scales_are_powers_of_the_root_of_two_exactly() -> None:
    steps = torch.arange(-MOST_STEPS, MOST_STEPS + 1)
    found = Outputs(steps.to(torch.int8)[None]).scales()[0]
    assert found.dtype == torch.float32
    root = float(torch.tensor(math.sqrt(2), dtype=torch.float32))
    assert found.tolist() == [2.0 ** (step // 2) * (root if step % 2 else 1.0) for step in steps.tolist()]


def test_scales_that_are_out_of_range_are_not_sound() -> None:
    assert Outputs().is_sound()
    for step, is_sound in ((0, True), (MOST_STEPS, True), (-MOST_STEPS, True), (MOST_STEPS + 1, False), (-128, False)):
        assert Outputs(torch.tensor([[0, step]], dtype=torch.int8)).is_sound() == is_sound


@pytest.mark.parametrize("seed", range(3))
def test_scales_cost_the_least_that_there_is(seed: int) -> None:
    """(mean √w rms)², by Cauchy's inequality, but for the rounding to powers of √2: 2 % on average, 12 % at most."""
    X, weights = uneven(seed)
    outputs = fitted(X, weights)
    assert outputs.exponents is not None
    assert outputs.exponents.dtype == torch.int8
    least = (weights.double().sqrt() * X.double().square().mean(1).sqrt()).mean(1).square()
    found = cost(X, weights, outputs.exponents)
    assert bool((found >= least * (1 - 1e-12)).all())
    assert bool((found <= 1.13 * least).all())
    assert bool((found < 0.5 * cost(X, weights, None)).all())


def test_scales_are_stored_where_they_save_twice_what_they_take() -> None:
    """A byte for an output is 8 / N bits an entry."""
    stored: list[bool] = []
    for spread in torch.linspace(0, 1.5, 10).tolist():
        X, weights = uneven(spread=spread, num_outputs=64)
        mean_squares = X.square().mean(1)
        always = fit_outputs(mean_squares, 200 * X.shape[1], weights).exponents  # for many inputs they cost nothing
        saved = 0.0 if always is None else float((cost(X, weights, None) / cost(X, weights, always)).log2().mean()) / 2
        stored.append(fit_outputs(mean_squares, X.shape[1], weights).exponents is not None)
        assert stored[-1] == (saved > 2 * 8 / N)
    assert stored == sorted(stored)
    assert set(stored) == {False, True}


def test_outputs_that_are_alike_have_no_scales() -> None:
    X, _ = uneven(spread=0.0)
    assert fitted(X, torch.ones(E, K)).exponents is None
    assert fitted(X[:, :, :1], torch.ones(E, 1)).exponents is None
    rms = X.square().mean(1, keepdim=True).sqrt()
    sizes = normal(E, 1, K, seed=5).exp().float()
    assert fitted(X / rms * sizes, sizes[:, 0].square()).exponents is None  # worth as much as they are large


def test_outputs_of_which_nothing_is_known_have_the_scale_of_the_others_mean() -> None:
    X, weights = uneven()
    X[0, :, 3] = 0
    weights[1, 5] = 0
    X[2] = 0
    found = fitted(X, weights).exponents
    assert found is not None
    assert (int(found[0, 3]), int(found[1, 5])) == (0, 0)
    assert not bool(found[2].any())
    for expert, left in ((0, 3), (1, 5)):
        known = [k for k in range(K) if k != left]
        others = fitted(X[expert : expert + 1, :, known], weights[expert : expert + 1, known]).exponents
        assert others is not None
        assert torch.equal(found[expert, known], others[0])
    for zeros in ((torch.zeros_like(X), weights), (uneven()[0], torch.zeros_like(weights))):
        assert fitted(*zeros).exponents is None


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e14])
@pytest.mark.parametrize("worth", [1e-30, 1e30])
def test_the_units_of_weights_and_worths_do_not_matter(size: float, worth: float) -> None:
    X, weights = uneven()
    expected = fitted(X, weights).exponents
    found = fitted(X * size, weights * worth)
    assert expected is not None
    assert found.exponents is not None
    assert int((found.exponents - expected).abs().max()) <= 1  # where rounding turns
    assert float((found.exponents != expected).float().mean()) < 0.1
    assert bool(found.apply(X * size).isfinite().all())


def test_extremes_are_within_what_a_scale_can_be() -> None:
    X, weights = torch.ones(1, N, 4), torch.ones(1, 4)
    X[:, :, 0], X[:, :, 1] = 1e15, 1e-18
    weights[0, 2], weights[0, 3] = 1e-30, 1e30
    outputs = fitted(X, weights)
    assert outputs.exponents is not None
    assert outputs.exponents[0, [0, 2]].max() < -MOST_STEPS // 2
    assert outputs.exponents[0, [1, 3]].min() > MOST_STEPS // 2
    assert outputs.is_sound()
    rows = outputs.apply(X)
    assert bool(rows.square().mean(2).isfinite().all())
    assert bool(outputs.undo(rows).isfinite().all())
