from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.bank.linalg import approximate_polar, eigh, inner, norms, polar, solve_positive, svd
from tests.random_experts import F64, normal, orthonormal


def test_inner_and_norms_are_per_item():
    x, y = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    torch.testing.assert_close(inner(x, y), (x * y).sum((1, 2)))
    torch.testing.assert_close(norms(x), x.square().sum((1, 2)).sqrt())
    assert norms(torch.zeros(2, 3)).tolist() == [0, 0]


def test_eigh_is_ascending_and_rebuilds():
    x = normal(3, 5, 5)
    x = x + x.mT
    values, vectors = eigh(x)
    assert (values.diff() >= 0).all()
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, x)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_svd_is_thin_and_rebuilds(shape: tuple[int, int]):
    x = normal(2, *shape)
    u, s, vh = svd(x)
    assert u.shape == (2, shape[0], 4)
    assert vh.shape == (2, 4, shape[1])
    torch.testing.assert_close((u * s[:, None]) @ vh, x)


def test_polar_is_the_best_orthonormal_match():
    x = normal(6, 7, 4)
    q = polar(x)
    torch.testing.assert_close(q.mT @ q, torch.eye(4, dtype=F64).expand(6, 4, 4))
    reached = inner(q, x)
    torch.testing.assert_close(reached, torch.linalg.matrix_norm(x, "nuc"))
    for seed in range(20):
        assert (inner(orthonormal(6, 7, 4, seed=seed), x) <= reached).all()


@given(size=st.integers(1, 6), batch=st.integers(1, 4), ridge=st.floats(0, 10), seed=st.integers(0, 1000))
def test_solve_positive_solves_the_ridged_system(size: int, batch: int, ridge: float, seed: int):
    root = normal(batch, size, size + 4, seed=seed)
    gram, rhs = root @ root.mT, normal(batch, size, 3, seed=seed + 1)
    solution, num_failed = solve_positive(gram, rhs, ridge)
    shift = ridge * torch.stack([g.trace() / size for g in gram])
    torch.testing.assert_close((gram + shift[:, None, None] * torch.eye(size)) @ solution, rhs)
    assert num_failed == 0


def test_solve_positive_takes_a_single_matrix():
    root, rhs = normal(4, 9), normal(4, 2, seed=1)
    solution, num_failed = solve_positive(root @ root.mT, rhs, 0.0)
    assert num_failed == 0
    torch.testing.assert_close(solution, torch.linalg.solve(root @ root.mT, rhs))
    singular = torch.ones(2, 2, dtype=F64)  # exact in floating point: the second pivot is 0
    solution, num_failed = solve_positive(singular, torch.full((2, 1), 4.0, dtype=F64), 0.0)
    assert num_failed == 1
    torch.testing.assert_close(solution, torch.full((2, 1), 2.0, dtype=F64))


def test_a_singular_matrix_is_counted_and_solved_by_least_squares():
    root = torch.tensor([[1.0, 2, 3], [1, 2, 3], [0, 1, 1]], dtype=F64)  # two equal rows, exact in floating point
    regular = torch.tensor([[2.0, 0, 1], [0, 3, 0], [1, 0, 4]], dtype=F64)
    gram, rhs = torch.stack([regular, root @ root.mT, regular]), normal(3, 3, 2)
    solution, num_failed = solve_positive(gram, rhs, 0.0)
    assert num_failed == 1
    torch.testing.assert_close(solution[1], torch.linalg.pinv(gram[1]) @ rhs[1])
    torch.testing.assert_close(solution[[0, 2]], torch.linalg.solve(gram[[0, 2]], rhs[[0, 2]]))


def test_nan_stays_with_its_own_matrix():
    gram, rhs = torch.eye(2, dtype=F64).repeat(3, 1, 1), normal(3, 2, 2)
    gram[1, 0, 0] = torch.nan
    solution, num_failed = solve_positive(gram, rhs, 0.0)
    assert num_failed == 1
    assert solution[1].isnan().all()
    torch.testing.assert_close(solution[[0, 2]], rhs[[0, 2]])


def test_a_zero_matrix_gives_zero_for_a_zero_right_hand_side():
    solution, _ = solve_positive(torch.zeros(2, 3, 3), torch.zeros(2, 3, 2), 1e-6)
    assert (solution == 0).all()


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), octave=st.integers(-30, 30), seed=st.integers(0, 50))
def test_the_approximate_polar_factor_is_near_the_exact_one(rows: int, columns: int, octave: int, seed: int) -> None:
    columns = min(rows, columns)
    x = normal(3, rows, columns, seed=seed) * 2.0**octave
    singular = torch.linalg.svdvals(approximate_polar(x))
    given_singular = torch.linalg.svdvals(x) / x.flatten(1).norm(dim=1, keepdim=True)
    assert (singular < 1 + 2e-3).all()
    assert ((singular - 1).abs() < 2e-3)[given_singular > 2e-3].all()
    large = given_singular[:, -1] > 2e-3
    torch.testing.assert_close(approximate_polar(x)[large], polar(x)[large], rtol=0, atol=5e-3)
