from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from globe.bank.factors import mix
from globe.bank.linalg import polar
from globe.init.procrustes import align, initial_frames, low_rank
from globe.init.subspaces import left_gram_rows
from tests.plain_alternation import plain_alternation
from tests.random_experts import F64, normal, orthonormal, planted_alignment

E, P, D = 8, 5, 12


@pytest.mark.parametrize("num_bases", [1, 3, 8])
def test_low_rank_is_the_truncated_svd(num_bases: int):
    stacked = normal(E, P, D)
    codes, bases, spectrum = low_rank(stacked, num_bases)
    u, s, vh = torch.linalg.svd(stacked.flatten(1), full_matrices=False)
    torch.testing.assert_close(mix(codes, bases).flatten(1), u[:, :num_bases] * s[:num_bases] @ vh[:num_bases])
    torch.testing.assert_close(spectrum, s)
    torch.testing.assert_close(codes.mT @ codes, torch.eye(num_bases, dtype=F64))
    torch.testing.assert_close(bases.flatten(1).norm(dim=1), s[:num_bases])


@pytest.mark.parametrize("rank", [2, 5])
def test_initial_frames_are_orthonormal(rank: int):
    weights = normal(E, P, D)
    frames = initial_frames(weights, rank)
    assert frames.shape == (E, P, rank)
    torch.testing.assert_close(frames.mT @ frames, torch.eye(rank, dtype=F64).expand(E, rank, rank))
    kept = (frames.mT @ weights).square().sum((1, 2))
    torch.testing.assert_close(kept, torch.linalg.svdvals(weights)[:, :rank].square().sum(1))


def implied_frames(weights: Tensor, aligned: Tensor) -> Tensor:
    """Q_e from Q_eᵀ W_e, unique because W_e has full row rank."""
    return torch.linalg.lstsq(weights.mT, aligned.mT).solution


@given(rank=st.integers(1, P), num_bases=st.integers(1, E), seed=st.integers(0, 1000))
def test_the_last_error_is_the_lowest_and_of_orthonormal_frames(rank: int, num_bases: int, seed: int):
    weights = normal(E, P, D, seed=seed)
    codes, bases, aligned, errors = align(weights, rank, num_bases, 6)
    assert len(errors) == 6
    assert errors[-1] <= errors[-2] + 1e-12
    assert errors[-1] <= errors[0] + 1e-12
    frames = implied_frames(weights, aligned)
    torch.testing.assert_close(frames.mT @ frames, torch.eye(rank, dtype=F64).expand(E, rank, rank))
    missed = (weights - frames @ mix(codes, bases)).norm() / weights.norm()
    assert errors[-1] == pytest.approx(float(missed), abs=1e-7)


@pytest.mark.parametrize("rank", [3, 5])
def test_two_steps_are_exact_and_more_are_better_than_without_extrapolation(rank: int):
    weights = planted_alignment(24, 5, D, rank, 2) + 0.3 * normal(24, 5, D, seed=7)
    plain = plain_alternation(weights, rank, 3, 12)
    assert align(weights, rank, 3, 2)[3] == pytest.approx(plain[:2], rel=1e-9)
    assert align(weights, rank, 3, 12)[3][-1] < plain[-1]


@pytest.mark.parametrize("seed", range(3))
def test_recovers_planted_factors(seed: int):
    """The problem is not convex, but with many experts for few bases the planted factors are found."""
    weights = planted_alignment(64, 8, 24, 8, 4, seed=10 * seed)
    codes, bases, _, errors = align(weights, 8, 4, 100)
    frames = polar(weights @ mix(codes, bases).mT)
    assert errors[0] > 0.3
    assert errors[-1] < 1e-3
    assert (weights - frames @ mix(codes, bases)).norm() < 1e-3 * weights.norm()


def test_below_full_rank_one_planted_basis_is_found_at_once():
    """Experts that share one basis have the same singular values and rows, once their signs are settled."""
    assert align(planted_alignment(64, 8, 24, 4, 1), 4, 1, 1)[3][0] < 1e-6


def test_the_row_frames_decide_the_start_but_not_the_end():
    """An expert's row order and rotation are arbitrary; the first frame, the identity, sees them."""
    weights = planted_alignment(64, 8, 24, 8, 4) + 0.1 * normal(64, 8, 24, seed=9)
    turned = orthonormal(64, 8, 8, seed=4) @ weights
    before, after = align(weights, 8, 4, 100)[3], align(turned, 8, 4, 100)[3]
    assert abs(before[0] - after[0]) > 1e-3
    assert before[-1] == pytest.approx(after[-1], rel=1e-3)


def test_below_full_rank_the_row_frames_do_not_matter_at_all():
    """There the first frames are singular vectors, which turn with the expert, their signs settled by the rows."""
    weights = normal(E, P, D)
    turned = orthonormal(E, P, P, seed=4) @ weights
    torch.testing.assert_close(initial_frames(weights, 3).mT @ weights, left_gram_rows(weights, 3))
    assert align(turned, 3, 2, 6)[3] == pytest.approx(align(weights, 3, 2, 6)[3], abs=1e-7)


def test_scale_and_order_of_the_experts_do_not_matter():
    weights = normal(E, P, D)
    _, _, _, errors = align(weights, P, 3, 5)
    assert align(1e-4 * weights, P, 3, 5)[3] == pytest.approx(errors, rel=1e-9)
    assert align(weights.flip(0), P, 3, 5)[3] == pytest.approx(errors, rel=1e-9)


def test_as_many_bases_as_experts_are_exact_at_once():
    codes, bases, aligned, errors = align(normal(E, P, D), P, E, 1)
    assert errors[0] < 1e-6
    torch.testing.assert_close(mix(codes, bases), aligned)


def extrapolated_alternation(weights: Tensor, rank: int, num_bases: int, steps: int) -> tuple[list[float], int]:
    """The alternation with exact polar factors and dense mixtures: errors, and how often the weights restarted."""
    errors, restarts, count = list[float](), 0, 0
    frames, last = initial_frames(weights, rank), torch.zeros(())
    for step in range(steps):
        stacked = (frames.mT @ weights).flatten(1)
        u, s, vh = torch.linalg.svd(stacked, full_matrices=False)
        now = (u[:, :num_bases] * s[:num_bases] @ vh[:num_bases]).view(len(weights), rank, -1)
        errors.append(float((weights - frames @ now).norm() / weights.norm()))
        rose = errors[-1] > min(errors)
        restarts, count = restarts + rose, 0 if rose else count + 1
        weight = (count - 1) / (count + 2) if count and step < steps - 2 else 0.0
        ahead = now + weight * (now - last) if step else now
        frames, last = polar(weights @ ahead.mT), now
    return errors, restarts


@pytest.mark.parametrize("seed", [1, 2])
def test_extrapolation_is_nesterovs_with_restarts(seed: int):
    weights = planted_alignment(24, 5, D, 3, 2, seed=seed) + 0.3 * normal(24, 5, D, seed=7 + seed)
    expected, restarts = extrapolated_alternation(weights, 3, 3, 30)
    assert restarts > 0
    assert align(weights, 3, 3, 30)[3] == pytest.approx(expected, rel=1e-9)


def test_the_last_frames_are_exact_even_of_experts_that_hardly_have_their_rank():
    weights = normal(E, P, D) * torch.logspace(0, -5, P, dtype=F64)[:, None]
    frames = implied_frames(weights, align(weights, P, 3, 6)[2])
    torch.testing.assert_close(frames.mT @ frames, torch.eye(P, dtype=F64).expand(E, P, P), rtol=0, atol=1e-6)
