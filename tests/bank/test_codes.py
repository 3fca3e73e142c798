from __future__ import annotations

import itertools
import math

import entmax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from globe.bank.codes import (
    CODE_FLOOR,
    check_codes,
    entropy,
    on_simplex,
    popularity,
    prune,
    pursue_codes,
    ridge_codes,
    simplex_codes,
    simplex_preimage,
    spread_codes,
    support,
    top_mask,
    update_temperature,
)
from globe.bank.factors import mix
from globe.errors import SettingsError
from tests.random_experts import F64, normal, orthonormal, simplex

E, R, D, M = 6, 4, 8, 5
MAPS = ["entmax15", "sparsemax", "softmax"]
BISECTION = {
    "entmax15": lambda z: entmax.entmax_bisect(z, alpha=1.5, n_iter=80),
    "sparsemax": lambda z: entmax.sparsemax_bisect(z, n_iter=80),
    "softmax": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),
}


def simplex_points(with_zeros: bool = True) -> st.SearchStrategy[Tensor]:
    shares = st.lists(st.floats(0.001, 1) | (st.just(0.0) if with_zeros else st.nothing()), min_size=2, max_size=7)
    return shares.filter(lambda p: sum(p) > 0).map(lambda p: torch.tensor([p], dtype=F64) / sum(p))


def missed(codes: Tensor, targets: Tensor, bases: Tensor) -> Tensor:
    return (targets - mix(codes, bases)).square().sum((1, 2))


# maps to the simplex


@pytest.mark.parametrize("name", MAPS)
@given(scale=st.floats(0.01, 20), seed=st.integers(0, 1000))
def test_maps_agree_with_bisection(name: str, scale: float, seed: int):
    z = scale * normal(3, M, seed=seed)
    torch.testing.assert_close(on_simplex(z, name), BISECTION[name](z), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", MAPS)
@given(data=st.data())
def test_preimage_is_a_right_inverse_on_the_simplex(name: str, data: st.DataObject):
    alpha = data.draw(simplex_points())
    torch.testing.assert_close(on_simplex(simplex_preimage(alpha, name), name), alpha, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MAPS)
def test_a_round_trip_does_not_drift(name: str):
    """The trap of a stored log α: repeated, entmax(log α) changes the support."""
    alpha = prune(simplex(4, 6, dtype=torch.float32), 0.1)
    state = alpha
    for _ in range(100):
        state = on_simplex(simplex_preimage(state, name), name)
    torch.testing.assert_close(state, alpha, rtol=1e-4, atol=1e-6)
    assert torch.equal(prune(state, 1e-6) > 0, alpha > 0)


def test_unknown_codes_are_refused_with_the_choice():
    with pytest.raises(SettingsError, match=r"'gumbel' are unknown; choose one of ridge, entmax15, sparsemax, softmax"):
        check_codes("gumbel")


# signed codes


def test_ridge_codes_are_least_squares():
    targets, bases = normal(E, R, D), normal(M, R, D, seed=1)
    found = ridge_codes(targets, bases, 0.0)
    expected = torch.linalg.lstsq(bases.flatten(1).mT, targets.flatten(1).mT).solution.mT
    torch.testing.assert_close(found, expected)


@given(lambda_=st.floats(0, 2), seed=st.integers(0, 1000))
def test_ridge_codes_satisfy_the_ridged_normal_equations(lambda_: float, seed: int):
    targets, bases = normal(E, R, D, seed=seed), normal(M, R, D, seed=seed + 1)
    s, b = targets.flatten(1), bases.flatten(1)
    codes = ridge_codes(targets, bases, lambda_)
    ridge = lambda_ * b.square().sum() / M
    torch.testing.assert_close((s - codes @ b) @ b.mT, ridge * codes, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("num_kept", [1, 2, 4])
def test_support_is_exact_and_optimal_on_itself(num_kept: int):
    targets, bases = normal(E, R, D), normal(M, R, D, seed=1)
    codes = ridge_codes(targets, bases, 0.0, num_kept=num_kept)
    assert ((codes != 0).sum(1) == num_kept).all()
    dense = ridge_codes(targets, bases, 0.0) * bases.flatten(1).norm(dim=1)
    for e in range(E):
        kept = codes[e] != 0
        assert dense[e][kept].abs().min() >= dense[e][~kept].abs().max()
        best = torch.linalg.lstsq(bases[kept].flatten(1).mT, targets[e].flatten()[:, None]).solution[:, 0]
        torch.testing.assert_close(codes[e][kept], best)


def test_support_of_orthogonal_atoms_is_the_best_of_all_supports():
    sizes = torch.tensor([1.0, 3, 0.1, 2, 10], dtype=F64)
    bases = orthonormal(1, R * D, M)[0].mT.reshape(M, R, D) * sizes[:, None, None]
    targets = normal(E, R, D)
    found = missed(ridge_codes(targets, bases, 0.0, num_kept=2), targets, bases)
    tried = []
    for pair in itertools.combinations(range(M), 2):
        codes = torch.zeros(E, M, dtype=F64)
        codes[:, pair] = ridge_codes(targets, bases[list(pair)], 0.0)
        tried.append(missed(codes, targets, bases))
    torch.testing.assert_close(found, torch.stack(tried).amin(0))


@pytest.mark.parametrize("num_kept", [1, 2, 4])
def test_pursuit_never_ends_worse_than_thresholding_and_is_optimal_on_its_support(num_kept: int):
    targets, bases = normal(E, R, D), normal(M, R, D, seed=1)
    begun = ridge_codes(targets, bases, 0.0)
    codes = pursue_codes(begun, targets, bases, num_kept, 0.0)
    assert ((codes != 0).sum(1) == num_kept).all()
    for e in range(E):
        kept = codes[e] != 0
        best = torch.linalg.lstsq(bases[kept].flatten(1).mT, targets[e].flatten()[:, None]).solution[:, 0]
        torch.testing.assert_close(codes[e][kept], best)
    thresholded = begun * top_mask(begun * bases.flatten(1).norm(dim=1), num_kept)
    assert (missed(codes, targets, bases) <= missed(thresholded, targets, bases) + 1e-12).all()


def test_pursuit_finds_planted_supports_whatever_the_scale_of_the_atoms():
    bases = normal(M, R, 4 * D, seed=1) * torch.logspace(-1, 1, M, dtype=F64)[:, None, None]
    planted = normal(E, M, seed=2) / bases.flatten(1).norm(dim=1)
    planted = planted * top_mask(normal(E, M, seed=3), 2)
    targets = (planted @ bases.flatten(1)).view(E, R, 4 * D)
    found = pursue_codes(torch.zeros_like(planted), targets, bases, 2, 1e-12)
    torch.testing.assert_close(found, planted, rtol=1e-6, atol=1e-9)


def naive_pursuit(codes: Tensor, targets: Tensor, bases: Tensor, num_kept: int, steps: int) -> Tensor:
    """Hard-thresholding pursuit, expert by expert, on atoms of unit norm."""
    norms = [float(base.norm()) for base in bases]
    design = torch.stack([base.flatten() / norm for base, norm in zip(bases, norms, strict=True)], 1)
    length = 1 / float(torch.linalg.matrix_norm(design, 2)) ** 2
    found = torch.zeros_like(codes)
    for e, target in enumerate(targets):
        x = codes[e] * torch.tensor(norms, dtype=F64)
        for _ in range(steps):
            x = x + length * design.mT @ (target.flatten() - design @ x)
            kept = sorted(range(len(x)), key=lambda j: -abs(float(x[j])))[:num_kept]
            x = torch.tensor([float(x[j]) if j in kept else 0.0 for j in range(len(x))], dtype=F64)
        best = torch.linalg.lstsq(design[:, kept], target.flatten()[:, None]).solution[:, 0]
        for j, value in zip(kept, best, strict=True):
            found[e, j] = value / norms[j]
    return found


@pytest.mark.parametrize("num_kept", [2, 3])
def test_pursuit_is_ten_gradient_steps_each_cut_to_the_support(num_kept: int):
    """From nothing, on atoms that are alike: one step alone ends on other supports and is further off."""
    sizes = torch.linspace(0.5, 2, 8, dtype=F64)
    bases = (normal(1, R, D, seed=1) + normal(8, R, D, seed=2)) * sizes[:, None, None]
    targets, nothing = mix(normal(30, 8, seed=3), bases) + normal(30, R, D, seed=4), torch.zeros(30, 8, dtype=F64)
    found = pursue_codes(nothing, targets, bases, num_kept, 0.0)
    torch.testing.assert_close(found, naive_pursuit(nothing, targets, bases, num_kept, 10))
    begun = 3 * normal(30, 8, seed=5)
    expected = naive_pursuit(begun, targets, bases, num_kept, 10)
    torch.testing.assert_close(pursue_codes(begun, targets, bases, num_kept, 0.0), expected)
    once = naive_pursuit(nothing, targets, bases, num_kept, 1)
    assert ((once != 0) != (found != 0)).any()
    assert missed(found, targets, bases).sum() < missed(once, targets, bases).sum()


def test_a_support_of_all_bases_is_dense():
    targets, bases = normal(E, R, D), normal(M, R, D, seed=1)
    assert torch.equal(ridge_codes(targets, bases, num_kept=M), ridge_codes(targets, bases))
    assert torch.equal(ridge_codes(targets, bases, num_kept=M + 3), ridge_codes(targets, bases))


def test_duplicate_and_dead_atoms_leave_finite_codes():
    targets, bases = normal(E, R, D), normal(M, R, D, seed=1)
    bases[1], bases[2] = bases[0], 0
    for num_kept in (None, 3):
        codes = ridge_codes(targets, bases, 1e-6, num_kept=num_kept)
        assert codes.isfinite().all()
        assert codes.abs().max() < 10
        assert (missed(codes, targets, bases) <= targets.square().sum((1, 2))).all()


def test_top_mask_marks_the_largest_magnitudes():
    mask = top_mask(torch.tensor([[1.0, -3, 2], [0, 0.1, -0.2]]), 2)
    assert mask.tolist() == [[False, True, True], [False, True, True]]
    assert top_mask(torch.ones(2, 3), 9).all()


# codes on the simplex


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("name", MAPS)
def test_simplex_codes_stay_on_the_simplex(name: str, temperature: float):
    targets, bases = normal(E, R, D), normal(M, R, D, seed=1)
    for dtype, slack in ((torch.float32, 1e-6), (F64, 1e-14)):
        start = prune(simplex(E, M, dtype=dtype), 0.05)
        kept = start.clone()
        codes = simplex_codes(start, targets.to(dtype), bases.to(dtype), name, temperature=temperature)
        assert codes.dtype == dtype
        assert (codes >= 0).all()
        assert (codes.sum(1) - 1).abs().max() <= slack
        assert torch.equal(start, kept)


@pytest.mark.parametrize("name", MAPS)
@given(seed=st.integers(0, 1000), correlated=st.booleans(), sparse=st.booleans())
def test_simplex_codes_do_not_raise_the_objective(name: str, seed: int, correlated: bool, sparse: bool):
    targets, bases = normal(E, R, D, seed=seed), normal(M, R, D, seed=seed + 1) + 5 * correlated
    start = prune(simplex(E, M, seed=seed), 0.2 if sparse else 0.0)
    before = missed(start, targets, bases)
    after = missed(simplex_codes(start, targets, bases, name, epsilon=1e-30), targets, bases)
    assert (after <= before * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", MAPS)
def test_simplex_codes_converge_to_the_constrained_optimum(name: str):
    """Against all supports: on each, least squares with Σ a = 1 by its KKT system; the best feasible one is optimal."""
    targets, bases = normal(E, R, D), normal(3, R, D, seed=1)
    gram, cross = bases.flatten(1) @ bases.flatten(1).mT, targets.flatten(1) @ bases.flatten(1).mT
    best = torch.full((E,), torch.inf, dtype=F64)
    for chosen in (s for size in (1, 2, 3) for s in itertools.combinations(range(3), size)):
        k = len(chosen)
        kkt = torch.zeros(k + 1, k + 1, dtype=F64)
        kkt[:k, :k], kkt[:k, k], kkt[k, :k] = gram[chosen, :][:, chosen], 1, 1
        right = torch.cat([cross[:, chosen], torch.ones(E, 1, dtype=F64)], 1)
        codes = torch.zeros(E, 3, dtype=F64)
        codes[:, chosen] = torch.linalg.solve(kkt, right.mT).mT[:, :k]
        feasible = (codes >= -1e-12).all(1)
        best = torch.where(feasible, torch.minimum(best, missed(codes, targets, bases)), best)
    codes = torch.full((E, 3), 1 / 3, dtype=F64)
    for _ in range(300):
        codes = simplex_codes(codes, targets, bases, name, epsilon=1e-12)
    torch.testing.assert_close(missed(codes, targets, bases), best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MAPS)
def test_temperature_flattens_or_sharpens(name: str):
    targets, bases, start = normal(E, R, D), normal(M, R, D, seed=1), simplex(E, M)
    spread = [
        entropy(simplex_codes(start, targets, bases, name, temperature=t, epsilon=1e-30)) for t in (0.2, 0.7, 1, 2, 9)
    ]
    assert all((wider >= narrower - 1e-12).all() for narrower, wider in itertools.pairwise(spread))
    assert (spread[-1] > spread[0]).any()


def test_temperature_acts_in_log_space():
    """T = 2 is the normalised square root of what T = 1 gives."""
    targets, bases, start = normal(E, R, D), normal(M, R, D, seed=1), simplex(E, M)
    root = simplex_codes(start, targets, bases, "softmax", epsilon=0.0).sqrt()
    found = simplex_codes(start, targets, bases, "softmax", temperature=2.0, epsilon=0.0)
    torch.testing.assert_close(found, root / root.sum(1, keepdim=True))


@pytest.mark.parametrize("name", MAPS)
def test_simplex_codes_have_no_entry_below_the_floor(name: str):
    """The last thing done to them is to prune at 10⁻³, after the temperature."""
    targets, bases, start = normal(E, R, D), normal(M, R, D, seed=1), simplex(E, M)
    for temperature in (0.2, 1.0, 5.0):
        whole = simplex_codes(start, targets, bases, name, temperature=temperature, epsilon=0.0)
        found = simplex_codes(start, targets, bases, name, temperature=temperature)
        torch.testing.assert_close(found, prune(whole, CODE_FLOOR))
        assert found[found > 0].min() >= CODE_FLOOR == 1e-3


@given(alpha=simplex_points(), epsilon=st.floats(0, 0.9))
def test_prune_drops_the_small_keeps_the_largest_and_renormalises(alpha: Tensor, epsilon: float):
    pruned = prune(alpha, epsilon)
    assert float(pruned.sum()) == pytest.approx(1)
    kept = pruned[0] > 0
    largest = alpha[0] == alpha[0].max()
    assert kept[largest].all()
    assert torch.equal(kept, ((alpha[0] >= epsilon) & (alpha[0] > 0)) | largest)
    torch.testing.assert_close(pruned[0][kept] / pruned.max(), alpha[0][kept] / alpha.max())


@pytest.mark.parametrize("num_kept", [1, 3, M])
def test_spread_codes_have_the_support_and_keep_the_order(num_kept: int):
    sparse = prune(simplex(E, M), 0.2)
    spread = spread_codes(sparse, num_kept)
    assert (support(spread) == num_kept).all()
    torch.testing.assert_close(spread.sum(1), torch.ones(E, dtype=F64))
    assert torch.equal(spread.argmax(1), sparse.argmax(1))


def test_every_atom_is_lent_a_tenth():
    alpha = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.3, 0.2, 0]], dtype=F64)
    expected = torch.tensor([[0.925, 0.025, 0.025, 0.025], [0.475, 0.295, 0.205, 0.025]], dtype=F64)
    torch.testing.assert_close(spread_codes(alpha, 4), expected)
    torch.testing.assert_close(spread_codes(alpha, 2)[1], torch.tensor([0.475, 0.295, 0, 0], dtype=F64) / 0.77)


@pytest.mark.parametrize("name", ["entmax15", "sparsemax"])
def test_a_temperature_can_widen_the_support_of_one_hot_codes(name: str):
    one_hot = torch.eye(M, dtype=F64)
    targets, bases = normal(M, R, D), normal(M, R, D, seed=1)
    wide = support(simplex_codes(one_hot, targets, bases, name, temperature=10.0)).double().mean()
    assert wide > support(simplex_codes(one_hot, targets, bases, name)).double().mean()


# what is said about codes


def test_entropy_has_no_bias():
    one_hot = torch.eye(4, dtype=F64)
    assert entropy(one_hot).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(entropy(torch.full((2, 8), 0.125)), torch.full((2,), math.log(8)))
    codes = torch.tensor([[0.5, -0.25, 0.25, 0.0]], dtype=F64)
    assert float(entropy(codes)) == pytest.approx(1.5 * math.log(2), abs=1e-15)
    assert float(entropy(10 * codes)) == pytest.approx(1.5 * math.log(2), abs=1e-15)
    assert entropy(torch.zeros(1, 3)).tolist() == [0]


def test_popularity_is_the_mean_share():
    codes = torch.tensor([[1.0, -1, 0], [0, 0, 5]], dtype=F64)
    assert popularity(codes).tolist() == [0.25, 0.25, 0.5]
    assert float(popularity(normal(E, M)).sum()) == pytest.approx(1)
    with_an_empty_one = torch.cat([codes, torch.zeros(3, 3, dtype=F64)])
    assert popularity(with_an_empty_one).tolist() == [0.25, 0.25, 0.5]
    assert popularity(torch.zeros(2, 3)).tolist() == [0, 0, 0]


def test_support_counts_non_zeros():
    assert support(torch.tensor([[0.0, -1e-9, 2], [0, 0, 0]])).tolist() == [2, 0]


# temperature

BOUNDS = {"rate": 0.1, "lowest": 0.05, "highest": 10.0}


@given(
    temperature=st.floats(0.05, 10),
    median_support=st.floats(0, 4096),
    target=st.integers(1, 64),
    rate=st.floats(1e-3, 5),
)
def test_temperature_stays_within_its_bounds(temperature: float, median_support: float, target: int, rate: float):
    found = update_temperature(temperature, median_support, target, rate=rate, lowest=0.05, highest=10.0)
    assert 0.05 <= found <= 10.0


def test_temperature_steers_against_the_support():
    assert update_temperature(1.0, 4, 4, **BOUNDS) == 1.0
    assert update_temperature(1.0, 8, 4, **BOUNDS) == pytest.approx(math.exp(-0.1))
    assert update_temperature(1.0, 2, 4, **BOUNDS) == pytest.approx(math.exp(0.05))
    assert update_temperature(1.0, 1e6, 1, **BOUNDS) == 0.05
    assert update_temperature(9.9, 0, 1, rate=5.0, lowest=0.05, highest=10.0) == 10.0


@pytest.mark.parametrize("name", ["entmax15", "sparsemax"])
def test_closed_loop_reaches_the_target_support(name: str):
    """Negative feedback: with codes = map(z / T), the median support settles at the target from either side."""
    z = normal(200, 16)
    for first in (0.05, 10.0):
        temperature = first
        for _ in range(200):
            median = float(support(on_simplex(z / temperature, name)).double().median())
            temperature = update_temperature(temperature, median, 4, **BOUNDS)
        assert abs(median - 4) <= 1
