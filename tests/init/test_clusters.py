from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.bank.linalg import norms
from globe.init.clusters import residual_greedy, spherical_kmeans
from tests.random_experts import F64, normal, orthonormal

E, R, D, M = 12, 3, 7, 4


@given(seed=st.integers(0, 1000), num_bases=st.integers(1, E))
def test_kmeans_ends_with_unit_means_and_nearest_centroids(seed: int, num_bases: int):
    rows = normal(E, R, D, seed=seed)
    centroids, cluster = spherical_kmeans(rows, num_bases, seed)
    torch.testing.assert_close(norms(centroids), torch.ones(num_bases, dtype=F64))
    unit = torch.nn.functional.normalize(rows.flatten(1), dim=1)
    for j in range(num_bases):
        members = unit[cluster == j]
        assert len(members) > 0
        torch.testing.assert_close(centroids[j].flatten(), torch.nn.functional.normalize(members.sum(0), dim=0))
    similarity = unit @ centroids.flatten(1).mT
    assert (similarity.gather(1, cluster[:, None])[:, 0] >= similarity.amax(1) - 1e-12).all()


def test_kmeans_finds_planted_clusters_whatever_their_length():
    directions = orthonormal(1, R * D, M)[0].mT
    member = torch.arange(E) % M
    lengths = torch.logspace(-3, 3, E, dtype=F64)[:, None]
    rows = lengths * (directions[member] + 0.01 * normal(E, R * D, seed=1))
    for seed in range(5):
        centroids, cluster = spherical_kmeans(rows.view(E, R, D), M, seed)
        together = cluster[:, None] == cluster[None]
        assert torch.equal(together, member[:, None] == member[None])
        torch.testing.assert_close(centroids.flatten(1)[cluster], directions[member], atol=0.05, rtol=0)


@pytest.mark.parametrize("num_distinct", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_duplicate_experts_leave_no_cluster_empty(num_distinct: int, seed: int):
    rows = normal(num_distinct, R, D)[torch.arange(E) % num_distinct]
    centroids, cluster = spherical_kmeans(rows, M, seed)
    torch.testing.assert_close(norms(centroids), torch.ones(M, dtype=F64))
    assert cluster.unique().tolist() == list(range(M))


def test_kmeans_repeats_itself_and_leaves_its_input_alone():
    rows = normal(E, R, D)
    kept = rows.clone()
    first, second = spherical_kmeans(rows, M, 3), spherical_kmeans(rows, M, 3)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(rows, kept)


def test_greedy_atoms_are_the_pivoted_gram_schmidt():
    rows = normal(E, R, D)
    atoms = residual_greedy(rows, M)
    flat, basis = rows.flatten(1), torch.empty(R * D, 0, dtype=F64)
    for j in range(M):
        residual = flat - flat @ basis @ basis.mT
        worst = residual[residual.norm(dim=1).argmax()]
        torch.testing.assert_close(atoms[j].flatten(), worst / worst.norm())
        basis = torch.cat([basis, (worst / worst.norm())[:, None]], 1)


def test_greedy_explains_experts_of_low_rank_exactly():
    rows = (normal(E, M) @ normal(M, R * D, seed=1)).view(E, R, D)
    atoms = residual_greedy(rows, M).flatten(1)
    torch.testing.assert_close(rows.flatten(1) @ atoms.mT @ atoms, rows.flatten(1))


def test_greedy_begins_from_given_atoms():
    rows, start = normal(E, R, D), normal(2, R, D, seed=1)
    start = start / norms(start)[:, None, None]
    atoms = residual_greedy(rows, 5, start)
    assert torch.equal(atoms[:2], start)
    torch.testing.assert_close(norms(atoms), torch.ones(5, dtype=F64))
    added = atoms[2:].flatten(1)
    torch.testing.assert_close(added @ start.flatten(1).mT, torch.zeros(3, 2, dtype=F64), atol=1e-5, rtol=0)
    assert torch.equal(residual_greedy(rows, 2, start), start)


def test_greedy_on_exhausted_experts_stays_finite():
    rows = normal(2, R, D)[torch.arange(E) % 2]
    assert residual_greedy(rows, M).isfinite().all()
    assert residual_greedy(torch.zeros(E, R, D), M).isfinite().all()
