from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from globe.bank.factors import mix
from globe.bank.objective import Problem, project
from globe.errors import SettingsError
from globe.init.warm_start import START_DEVIATION, to_simplex, warm_start
from globe.terms import CodeMap, WarmStartName
from tests.random_experts import F64, normal, orthonormal, planted_alignment, simplex

E, P, D = 8, 5, 9
NAMES = get_args(WarmStartName)
MAPS = get_args(CodeMap)
OWN_METRICS = {
    "procrustes": {"alignment_error", "alignment_error_start"},
    "svd": {"explained"},
    "left_gram_pca": {"explained"},
    "ts_pca": {"explained", "mean_angle"},
    "spherical_kmeans": {"mean_cosine"},
    "residual_greedy": {"largest_residual"},
    "hybrid": {"mean_cosine", "largest_residual"},
}
HIGHEST = {"mean_angle": math.pi / 2, "target_error": 2.0}  # one atom on the simplex may oppose an expert


@pytest.mark.parametrize("codes", MAPS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rank", "num_bases"), [(3, 4), (5, 8), (1, 1), (5, 1)])
def test_every_warm_start_is_finite_of_the_right_shape_and_measured(name: str, codes: str, rank: int, num_bases: int):
    weights = normal(E, P, D, dtype=torch.float32)
    kept = weights.clone()
    start = warm_start(weights, rank, num_bases, name, codes=codes)
    assert torch.equal(weights, kept)
    assert start.codes.shape == (E, num_bases)
    assert start.bases.shape == (num_bases, rank, D)
    assert start.targets.shape == (E, rank, D)
    for x in (start.codes, start.bases, start.targets):
        assert x.dtype == torch.float32
        assert x.isfinite().all()
    if codes == "ridge":
        assert start.metrics["target_error"] < 1
    else:
        assert (start.codes >= 0).all()
        torch.testing.assert_close(start.codes.sum(1), torch.ones(E))
    assert set(start.metrics) == {"target_error"} | OWN_METRICS[name]
    for metric, value in start.metrics.items():
        assert 0 <= value <= HIGHEST.get(metric, 1 + 1e-6), metric
    missed = (mix(start.codes, start.bases) - start.targets).norm() / start.targets.norm()
    assert start.metrics["target_error"] == pytest.approx(float(missed), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_mixtures_have_the_deviation_of_a_start_at_any_scale_of_the_weights(name: str):
    weights = normal(E, P, D)
    start, tiny = warm_start(weights, 3, 4, name), warm_start(1e-3 * weights, 3, 4, name)
    mixed = mix(start.codes, start.bases)
    assert float(mixed.std()) == pytest.approx(START_DEVIATION)
    torch.testing.assert_close(mix(tiny.codes, tiny.bases), mixed, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(tiny.targets, start.targets, rtol=1e-6, atol=1e-7)
    assert tiny.metrics == pytest.approx(start.metrics)


@pytest.mark.parametrize("codes", ["ridge", "sparsemax", "softmax"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bytes(name: str, codes: str):
    weights = normal(E, P, D, dtype=torch.float32)
    torch.manual_seed(1)
    first = warm_start(weights, 3, 4, name, codes=codes, seed=5)
    torch.manual_seed(2)
    second = warm_start(weights, 3, 4, name, codes=codes, seed=5)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.bases, second.bases)
    assert torch.equal(first.targets, second.targets)
    assert first.metrics == second.metrics


@pytest.mark.parametrize("name", ["spherical_kmeans", "hybrid"])
def test_the_seed_reaches_what_is_random(name: str):
    weights = normal(E, P, D)
    bases = [warm_start(weights, 3, 6, name, seed=seed).bases for seed in range(6)]
    assert any(not torch.equal(bases[0], other) for other in bases[1:])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ts_pca"])
def test_as_many_bases_as_experts_meet_the_targets(name: str):
    assert warm_start(normal(E, P, D), 3, E, name).metrics["target_error"] < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_more_bases_come_nearer_to_the_targets(name: str):
    errors = [warm_start(normal(E, P, D), P, m, name).metrics["target_error"] for m in (1, 4, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.7 * errors[0]


@pytest.mark.parametrize("codes", ["ridge", "softmax"])
@pytest.mark.parametrize("name", NAMES)
def test_duplicate_and_zero_experts_stay_finite(name: str, codes: str):
    duplicates = normal(2, P, D, dtype=torch.float32)[torch.arange(E) % 2]
    with_a_zero = normal(E, P, D, dtype=torch.float32)
    with_a_zero[2] = 0
    for weights in (duplicates, with_a_zero):
        start = warm_start(weights, 3, 4, name, codes=codes)
        assert start.codes.isfinite().all()
        assert start.bases.isfinite().all()
        assert all(math.isfinite(value) for value in start.metrics.values())


def test_alignment_beats_the_warm_starts_that_do_not_align():
    weights = planted_alignment(24, 6, 16, 6, 3)
    weights = weights / weights.std() + 0.1 * normal(24, 6, 16, seed=7)

    def fitted(name: str) -> float:
        start = warm_start(weights, 6, 3, name)
        return project(Problem(weights), start.codes, start.bases, "identity").objective

    errors = {name: fitted(name) for name in NAMES}
    assert min(errors, key=errors.__getitem__) == "procrustes"
    start = warm_start(weights, 6, 3)
    assert project(Problem(weights), start.codes, start.bases, "identity").objective == errors["procrustes"]


def test_more_alignment_steps_lower_the_alignment_error():
    weights = normal(E, P, D)
    errors = [warm_start(weights, P, 3, align_steps=n).metrics["alignment_error"] for n in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]
    assert warm_start(weights, P, 3, align_steps=16).metrics["alignment_error_start"] == errors[0]


def test_an_unknown_warm_start_is_refused_with_the_choice():
    with pytest.raises(SettingsError, match=r"'random' is unknown; choose one of procrustes, svd, .*hybrid"):
        warm_start(normal(E, P, D), 3, 4, "random")


def test_change_to_the_simplex_is_exact_where_pure_experts_exist():
    """With the corners of the simplex among the experts, in any signed basis, every mixture is kept."""
    on_corners = torch.cat([torch.eye(3, dtype=F64), simplex(5, 3)])[torch.randperm(8)]
    corners, change = normal(3, 4, 6), normal(3, 3, seed=1)
    mixed = mix(on_corners, corners)
    codes, bases = to_simplex(on_corners @ change, torch.einsum("jk,krd->jrd", torch.linalg.inv(change), corners))
    assert (codes >= 0).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(8, dtype=F64))
    torch.testing.assert_close(mix(codes, bases), mixed, rtol=1e-4, atol=1e-4)


def test_change_to_the_simplex_takes_experts_as_atoms():
    signed, bases = normal(E, 4), orthonormal(1, 12, 4)[0].mT.reshape(4, 3, 4)
    _, atoms = to_simplex(signed, bases)
    distance = torch.cdist(atoms.flatten(1), mix(signed, bases).flatten(1)).amin(1)
    assert distance.max() < 1e-6
    assert len({tuple(atom.flatten().tolist()) for atom in atoms}) == 4


def test_change_to_the_simplex_takes_different_experts_even_of_low_rank():
    signed = normal(E, 1) @ normal(1, 4, seed=1)
    _, atoms = to_simplex(signed, normal(4, 3, 5, seed=2))
    assert len({tuple(atom.flatten().tolist()) for atom in atoms}) == 4


@pytest.mark.parametrize("seed", range(4))
def test_change_to_the_simplex_takes_the_mixtures_that_stand_out_most(seed: int):
    """Successive projection on the mixtures themselves, from bases neither orthogonal nor of one size."""
    signed = normal(12, 4, seed=seed)
    bases = (normal(4, 3, 5, seed=10 + seed) + normal(1, 3, 5, seed=20 + seed)) * torch.logspace(-1, 1, 4, dtype=F64)[
        :, None, None
    ]
    mixed = mix(signed, bases)
    residual, expected = mixed.flatten(1).clone(), []
    for _ in range(4):
        expected.append(int(residual.norm(dim=1).argmax()))
        direction = residual[expected[-1]] / residual[expected[-1]].norm()
        residual -= (residual @ direction)[:, None] * direction
    torch.testing.assert_close(to_simplex(signed, bases)[1], mixed[expected])
