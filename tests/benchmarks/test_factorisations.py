"""MoLAE, whitened SVD, D²-MoE and TD-MoE against what numpy finds, on planted experts, and within the budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.calibration import damped
from benchmarks.rivals.d2_moe import base_weight, d2_moe, delta_rank
from benchmarks.rivals.molae import latent_rank, molae
from benchmarks.rivals.truncated_svd import svd_rank
from benchmarks.rivals.tucker import best_ranks, stored_parameters, td_moe, tucker
from benchmarks.rivals.whitened_svd import whitened_svd
from globe.errors import SettingsError
from globe.terms import FAMILIES, Family
from tests.benchmarks.calibrated import invented
from tests.random_experts import normal

E, P, D = 6, 8, 20
F32 = torch.float32


def square_root(moment: torch.Tensor) -> np.ndarray:
    """The symmetric one, unlike the library's."""
    values, vectors = np.linalg.eigh(moment.double().numpy())
    return (vectors * np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize("family", FAMILIES)
def test_whitened_svd_is_the_optimum_of_its_metric(family: Family) -> None:
    experts, calibration = normal(E, P, D, dtype=F32), invented(E, P, D)
    found = whitened_svd({(0, family): experts}, 0.5, F32, calibration).stacks[0, family]
    moments = damped(calibration.moment(0, family)).expand(E, -1, -1)
    rank = svd_rank(P, D, 0.5)
    for expert, approximation, moment in zip(experts.numpy(), found.numpy(), moments, strict=True):
        root = square_root(moment)
        weigh = (lambda w, r=root: r @ w) if family == "down" else (lambda w, r=root: w @ r)
        left_out = np.linalg.svd(weigh(expert), compute_uv=False)[rank:]
        assert np.linalg.norm(weigh(expert - approximation)) == pytest.approx(np.linalg.norm(left_out), rel=1e-4)
        assert np.linalg.matrix_rank(approximation, tol=1e-4) == rank


def test_molae_is_the_optimum_of_the_stacked_experts() -> None:
    experts = normal(E, P, D, dtype=F32)
    found = molae({(0, "gate"): experts}, 0.5, F32)
    rank = latent_rank(E, P, D, 0.5)
    left_out = np.linalg.svd(experts.flatten(0, 1).numpy(), compute_uv=False)[rank:]
    assert float((experts - found.stacks[0, "gate"]).norm()) == pytest.approx(np.linalg.norm(left_out), rel=1e-5)


def test_d2_moe_keeps_a_shared_base_and_differences_of_low_rank() -> None:
    base, calibration = normal(P, D, dtype=F32), invented(E, P, D)
    delta = normal(E, P, 1, seed=1, dtype=F32) @ normal(E, 1, D, seed=2, dtype=F32)
    counts = calibration.layers[0].counts
    experts = base + delta - base_weight(delta, counts)
    torch.testing.assert_close(base_weight(experts, counts), base, rtol=1e-4, atol=1e-5)
    same = d2_moe({(0, "up"): base.expand(E, P, D)}, 0.6, F32, calibration)
    torch.testing.assert_close(same.stacks[0, "up"], base.expand(E, P, D), rtol=1e-4, atol=1e-5)
    unweighted = base + delta  # the weighted mean of the deltas has a rank of E at most, P here
    found = d2_moe({(0, "up"): unweighted}, 0.99, F32, calibration)
    assert float((found.stacks[0, "up"] - unweighted).norm() / unweighted.norm()) < 0.5


def test_tucker_finds_a_planted_decomposition() -> None:
    core, factors = normal(2, 3, 4), [torch.linalg.qr(normal(n, r, seed=r))[0] for n, r in ((E, 2), (P, 3), (D, 4))]
    planted = torch.einsum("abc,ea,pb,dc->epd", core, *factors)
    budget = stored_parameters((E, P, D), (2, 3, 4))
    found, sides = tucker(planted.float(), budget)
    assert found.shape == (2, 3, 4)
    torch.testing.assert_close(torch.einsum("abc,ea,pb,dc->epd", found, *sides), planted.float(), rtol=1e-3, atol=1e-4)


def test_tucker_ranks_are_the_best_of_all() -> None:
    core, budget = normal(3, 4, 5), 40
    tried = {
        (a, b, c): float(core[:a, :b, :c].square().sum())
        for a in (1, 2, 3)
        for b in (1, 2, 3, 4)
        for c in (1, 2, 3, 4, 5)
        if stored_parameters((3, 4, 5), (a, b, c)) <= budget
    }
    assert tried[best_ranks(core, budget)] == pytest.approx(max(tried.values()))


@pytest.mark.parametrize("family", ["gate", "down"])
def test_tucker_undoes_the_whitening(family: Family) -> None:
    experts, calibration = normal(E, P, D, dtype=F32), invented(E, P, D)
    found = td_moe({(0, family): experts}, 1.0, F32, calibration)
    assert found.shape == f"r={E} x {P} x {D}"
    assert found.stored_parameters == experts.numel()
    torch.testing.assert_close(found.stacks[0, family], experts, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.9])
@pytest.mark.parametrize("family", ["up", "down"])
def test_budgets_are_kept_and_spent(keep: float, family: Family) -> None:
    stacks, calibration = {(0, family): normal(E, P, D, dtype=F32)}, invented(E, P, D)
    whole = E * P * D
    for found, slack in (
        (whitened_svd(stacks, keep, F32, calibration), E * (P + D)),
        (molae(stacks, keep, F32), E * P + D),
        (d2_moe(stacks, keep, F32, calibration), E * (P + D)),
        (td_moe(stacks, keep, F32, calibration), 0.2 * whole),
    ):
        assert found.stored_parameters <= keep * whole < found.stored_parameters + slack
        assert found.stacks[0, family].shape == (E, P, D)


def test_budgets_too_small() -> None:
    with pytest.raises(SettingsError, match="no latent space"):
        latent_rank(2, 2, 20, 0.1)
    with pytest.raises(SettingsError, match="no rank beside"):
        delta_rank(2, 4, 4, 0.5)
    with pytest.raises(SettingsError, match="no Tucker ranks"):
        best_ranks(normal(3, 4, 5), 2)
