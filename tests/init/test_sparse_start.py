from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from globe.bank.codes import top_mask
from globe.bank.factors import mix
from globe.init.procrustes import align
from globe.init.sparse_start import align_sparse, varimax
from globe.init.warm_start import warm_start
from tests.random_experts import F64, normal, orthonormal

E, P, D, M = 24, 5, 30, 6


def planted(num_kept: int):
    """W_e = Q_e Σ_j a_ej B_j with `num_kept` codes each."""
    codes = normal(E, M, seed=1) * top_mask(normal(E, M, seed=2), num_kept)
    return orthonormal(E, P, P, seed=3) @ mix(codes, normal(M, P, D, seed=4))


def test_varimax_is_a_rotation_that_finds_sparse_codes():
    sparse = normal(200, 4) * top_mask(normal(200, 4, seed=1), 1)
    mixed = sparse @ orthonormal(1, 4, 4, seed=2)[0]
    rotation = varimax(mixed)
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(4, dtype=F64))
    found = mixed @ rotation
    largest = found.abs().amax(1)
    assert (found.square().sum(1) - largest.square()).max() < 0.05 * found.square().sum(1).mean()


@pytest.mark.parametrize("seed", range(4))
def test_varimax_is_the_best_of_all_angles(seed: int):
    """Of codes without any sparse frame, where the two columns' sizes differ: against a scan of all rotations."""
    codes = normal(50, 2, seed=seed) * torch.tensor([1.0, 2.0], dtype=F64) @ orthonormal(1, 2, 2, seed=seed)[0]

    def variance_of_squares(rotation: Tensor) -> float:
        return float((codes @ rotation).square().var(0, correction=0).sum())

    angles = torch.linspace(0, torch.pi / 2, 2001, dtype=F64)
    scanned = [
        variance_of_squares(torch.stack([torch.stack([c, -s]), torch.stack([s, c])]))
        for c, s in zip(angles.cos(), angles.sin(), strict=True)
    ]
    found = variance_of_squares(varimax(codes))
    assert found == pytest.approx(max(scanned), rel=1e-5)
    assert found > variance_of_squares(torch.eye(2, dtype=F64))


@pytest.mark.parametrize("num_kept", [1, 2, 4])
@pytest.mark.parametrize("rank", [3, 5])
def test_a_sparse_alignment_has_the_support_and_beats_a_cut_dense_one(rank: int, num_kept: int):
    weights = planted(num_kept) + 0.1 * normal(E, P, D, seed=9)
    codes, bases, aligned, _ = align(weights, rank, M, 20)
    sparse_codes, sparse_bases, sparse_aligned = align_sparse(weights, codes, bases, num_kept, 20)
    assert ((sparse_codes != 0).sum(1) == num_kept).all()
    assert sparse_bases.shape == (M, rank, D)
    assert (sparse_aligned.square().sum((1, 2)) <= weights.square().sum((1, 2)) + 1e-9).all()
    cut = codes * top_mask(codes * bases.flatten(1).norm(dim=1), num_kept)
    energy = weights.square().sum()
    sparse = energy - sparse_aligned.square().sum() + (sparse_aligned - mix(sparse_codes, sparse_bases)).square().sum()
    dense = energy - aligned.square().sum() + (aligned - mix(cut, bases)).square().sum()
    assert sparse < 0.95 * dense


def test_more_alternations_lower_the_error():
    weights = planted(2)
    codes, bases, _, _ = align(weights, P, M, 5)
    missed = []
    for steps in (1, 4, 30):
        a, b, aligned = align_sparse(weights, codes, bases, 2, steps)
        missed.append(float((aligned - mix(a, b)).norm()))
    assert all(later < earlier for earlier, later in itertools.pairwise(missed))


def test_every_basis_is_mixed_even_where_experts_repeat():
    weights = normal(4, P, D)[torch.arange(E) % 4]
    codes, bases, _, _ = align(weights, P, M, 5)
    a, b, aligned = align_sparse(weights, codes, bases, 1, 10)
    assert all(x.isfinite().all() for x in (a, b, aligned))
    assert (aligned - mix(a, b)).norm() < 1e-4 * weights.norm()


def test_a_support_changes_signed_warm_starts_only():
    weights = normal(E, P, D)
    assert ((warm_start(weights, 3, M, support=2).codes != 0).sum(1) == 2).all()
    assert torch.equal(warm_start(weights, 3, M, support=M).codes, warm_start(weights, 3, M).codes)
    on_simplex = (warm_start(weights, 3, M, codes="entmax15", support=s).codes for s in (2, None))
    assert torch.equal(*on_simplex)


def test_a_basis_that_nobody_mixes_becomes_the_expert_that_is_met_worst():
    codes, bases = normal(E, M, seed=1), normal(M, P, D, seed=2)
    weights = mix(codes[:, :4], bases[:4]) + 0.1 * normal(E, P, D, seed=3)
    weights[7] *= 4
    codes, bases = codes * torch.tensor([1.0, 1, 1, 1, 1e-6, 1e-6], dtype=F64), bases.clone()
    bases[4:] *= 1e-6
    found, learned, aligned = align_sparse(weights, codes, bases, 1, 1)
    idle = (found == 0).all(0)
    assert idle.any()
    missed = (aligned - mix(found, learned)).flatten(1).norm(dim=1)
    worst = missed.argsort(descending=True)[: int(idle.sum())]
    torch.testing.assert_close(learned[idle], aligned[worst])
