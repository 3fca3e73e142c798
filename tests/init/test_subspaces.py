from __future__ import annotations

import pytest
import torch
from torch import Tensor

from globe.init.subspaces import left_gram_rows, right_singular_rows, tangent_rows
from tests.random_experts import F64, normal, orthonormal

E, P, D = 6, 5, 9
RANKS = [1, 3, 5]


def projectors(rows: Tensor) -> Tensor:
    """Orthogonal projectors (E, D, D) on the row spaces."""
    q = torch.linalg.qr(rows.mT)[0]
    return q @ q.mT


@pytest.mark.parametrize("rank", RANKS)
def test_right_singular_rows_span_the_leading_row_space(rank: int):
    weights = normal(E, P, D)
    rows = right_singular_rows(weights, rank)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(rank, dtype=F64).expand(E, rank, rank))
    kept = (weights @ rows.mT).square().sum((1, 2))
    torch.testing.assert_close(kept, torch.linalg.svdvals(weights)[:, :rank].square().sum(1))


@pytest.mark.parametrize("rank", RANKS)
def test_left_gram_rows_carry_their_energy(rank: int):
    weights = normal(E, P, D)
    rows = left_gram_rows(weights, rank)
    energies = torch.linalg.svdvals(weights)[:, :rank].square()
    torch.testing.assert_close(rows @ rows.mT, torch.diag_embed(energies))
    scaled = right_singular_rows(weights, rank) * energies.sqrt()[:, :, None]
    torch.testing.assert_close(rows, scaled)  # the two agree, signs included


@pytest.mark.parametrize("method", [right_singular_rows, left_gram_rows])
def test_rows_do_not_depend_on_the_row_frame_of_an_expert(method):
    weights = normal(E, P, D)
    turned = orthonormal(E, P, P, seed=1) @ weights
    torch.testing.assert_close(method(turned, 3), method(weights, 3))
    peaks = method(weights, 3)
    assert (peaks.gather(2, peaks.abs().argmax(2, keepdim=True)) > 0).all()


@pytest.mark.parametrize("rank", RANKS)
def test_tangents_are_the_logarithms_of_the_row_spaces(rank: int):
    """The exponential map of Δ_e at the mean, Y cosΘ + sinΘ, spans the row space of the expert again."""
    weights = normal(1, P, D) + 0.4 * normal(E, P, D, seed=1)
    mean, tangents = tangent_rows(weights, rank)
    torch.testing.assert_close(mean @ mean.mT, torch.eye(rank, dtype=F64))
    torch.testing.assert_close(tangents @ mean.mT, torch.zeros(E, rank, rank, dtype=F64), atol=1e-10, rtol=0)
    left, angles, right = torch.linalg.svd(tangents, full_matrices=False)
    reached = left @ (angles.cos()[..., None] * (left.mT @ mean) + angles.sin()[..., None] * right)
    rows = right_singular_rows(weights, rank)
    torch.testing.assert_close(projectors(reached), projectors(rows))
    cosines = torch.linalg.svdvals(rows @ mean.mT)
    torch.testing.assert_close(angles.flip(1), cosines.clamp(max=1).acos(), atol=1e-7, rtol=1e-6)


def test_the_mean_row_space_keeps_most_of_all_row_spaces():
    weights = normal(1, P, D) + 0.4 * normal(E, P, D, seed=1)
    rows, mean = right_singular_rows(weights, 3), tangent_rows(weights, 3)[0]
    kept = (rows @ mean.mT).square().sum()
    for seed in range(20):
        assert (rows @ orthonormal(1, D, 3, seed=seed)[0]).square().sum() <= kept


def test_equal_row_spaces_have_no_tangents():
    weights = orthonormal(E, P, P, seed=1) @ normal(1, P, D)
    mean, tangents = tangent_rows(weights, P)
    assert tangents.abs().max() < 1e-10
    torch.testing.assert_close(projectors(mean[None]), projectors(weights[:1]))
