"""Rivals that code experts in few bits: within their budget, better than rounding, and right in their parts."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from benchmarks.calibration import Calibration
from benchmarks.rivals.bitsmoe import WIDTHS, bitsmoe, choose_widths, round_columns
from benchmarks.rivals.qtip import hadamard, qtip, rotation, spread_widths
from benchmarks.rivals.rounding import bits_of_a_weight, rounding
from benchmarks.rivals.watersic import TOLERANCE, code_at, entropy_bits, watersic
from benchmarks.stacks import Approximation, Stacks
from globe.errors import SettingsError
from globe.quant.feedback import order_inputs
from globe.terms import FAMILIES
from tests.benchmarks.calibrated import invented
from tests.random_experts import normal

F32 = torch.float32
E, P, D = 24, 24, 64
RIVALS = {"QTIP": qtip, "WaterSIC": watersic, "BitsMoE": bitsmoe}


def falling(size: int, seed: int) -> torch.Tensor:
    """A second moment whose eigenvalues fall by a factor of 10,000, in a random basis."""
    basis = torch.linalg.qr(normal(size, size, seed=seed))[0]
    return ((basis * torch.logspace(0, -4, size)) @ basis.mT).float()


@pytest.fixture(scope="module")
def problem() -> tuple[Stacks, Calibration]:
    stacks = {(0, family): normal(E, P, D, seed=place, dtype=F32) for place, family in enumerate(FAMILIES)}
    calibration = invented(E, P, D)
    inner = torch.stack([falling(P, seed) for seed in range(E)])
    layer = dataclasses.replace(calibration.layers[0], inputs=falling(D, E), inner=inner)
    return stacks, dataclasses.replace(calibration, layers={0: layer})


def calibrated_error(stacks: Stacks, calibration: Calibration, found: Approximation) -> float:
    """Mean over the families of the relative squared error of the outputs."""
    total = 0.0
    for key, experts in stacks.items():
        off = found.stacks[key] - experts
        x, y = (experts, off) if key[1] == "down" else (experts.mT, off.mT)
        moment = calibration.moment(*key)
        total += float((y * (moment @ y)).sum() / (x * (moment @ x)).sum()) / len(stacks)
    return total


@pytest.mark.parametrize("bits", [3, 2.5])
@pytest.mark.parametrize("rival", RIVALS)
def test_better_than_rounding_within_the_budget(problem: tuple[Stacks, Calibration], rival: str, bits: float) -> None:
    stacks, calibration = problem
    found = RIVALS[rival](stacks, bits, calibration)
    assert found.bits is not None
    assert bits - 0.02 < found.bits <= bits
    group = {3: 32, 2.5: 64}[bits]
    assert bits_of_a_weight(2, group) == bits
    plain = rounding(stacks, 2, group)
    assert calibrated_error(stacks, calibration, found) < 0.5 * calibrated_error(stacks, calibration, plain)


def test_a_basis_for_nothing_loses_less(problem: tuple[Stacks, Calibration]) -> None:
    stacks, calibration = problem
    counted, free = bitsmoe(stacks, 2.5, calibration), bitsmoe(stacks, 2.5, calibration, count_basis=False)
    assert free.shape == f"r={D}"
    assert calibrated_error(stacks, calibration, free) < calibrated_error(stacks, calibration, counted)


@pytest.mark.parametrize(("log2", "twelves"), [(0, 0), (3, 0), (0, 1), (2, 2)])
def test_hadamard(log2: int, twelves: int) -> None:
    found = hadamard(log2, twelves).double()
    size = 2**log2 * 12**twelves
    torch.testing.assert_close(found @ found.mT, torch.eye(size, dtype=found.dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.abs(), torch.full_like(found, size**-0.5))


@pytest.mark.parametrize("size", [1, 5, 48, 64, 112, 576])
def test_rotation_is_orthogonal(size: int) -> None:
    found = rotation(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found @ found.mT, torch.eye(size), atol=1e-5, rtol=0)
    assert found.abs().max() == pytest.approx(size**-0.5) or size in (5, 112)


@pytest.mark.parametrize("bits", [1.5, 2, 2.37, 3, 8])
def test_widths_are_spread_within_the_budget(bits: float) -> None:
    widths = spread_widths(200, bits).double() / 2  # of half bits
    assert bool((widths == widths.round()).all())
    assert widths.max() - widths.min() <= 1
    assert bits - 1 / 200 < widths.mean() <= bits
    assert abs(widths[:100].sum() - widths[100:].sum()) <= 1
    with pytest.raises(SettingsError, match="at least 1 bit"):
        spread_widths(200, 0.99)


def test_entropy_is_that_of_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    symbols = torch.multinomial(p, 200_000, replacement=True, generator=generator).view(100, 2000) - 2
    assert float(entropy_bits(symbols.float()).sum()) / symbols.numel() == pytest.approx(1.75, abs=2e-3)
    assert float(entropy_bits(torch.ones(1, 5))) == 0


def test_every_input_loses_the_same() -> None:
    """At a fine level an entry of any input costs c² / 12, whatever C is."""
    X, order = normal(3, 16, 400, dtype=F32), order_inputs(falling(16, 1)[None] + 0.01 * torch.eye(16))
    level = 0.1 * float(order.prices.min().sqrt())
    coded, _ = code_at(X, order, level)
    assert not torch.equal(coded, X)
    moment, off = falling(16, 1) + 0.01 * torch.eye(16), coded - X
    cost = float((off * (moment @ off)).sum()) / off.numel()
    assert cost == pytest.approx(level**2 / 12, rel=0.05)


def test_watersic_spends_its_budget(problem: tuple[Stacks, Calibration]) -> None:
    found = watersic(problem[0], 4, problem[1])
    assert found.bits is not None
    assert 4 - TOLERANCE <= found.bits <= 4


@pytest.mark.parametrize("width", [width for width in WIDTHS if width])
def test_columns_are_rounded_to_a_grid_that_fits(width: int) -> None:
    F = normal(4000, 3, dtype=F32) * torch.tensor([1.0, 0.01, 30.0])
    found = round_columns(F, width)
    assert all(len(column.unique()) <= 2**width for column in found.unbind(1))
    error = (found - F).square().mean(0) / F.square().mean(0)
    expected = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495, 6: 0.001040, 8: 0.0000904}[width]  # Max 1960
    torch.testing.assert_close(error, torch.full_like(error, expected), rtol=0.15, atol=0)


@pytest.mark.parametrize("budget", [0, 7, 20, 33, 1000])
def test_widths_are_the_integer_programs(budget: int) -> None:
    """At what they take in the end, no choice that takes no more costs less."""
    errors = normal(4, 3).abs().cumsum(1).flip(1).float()
    costs = torch.tensor([0.0, 5.0, 9.0])
    choice = choose_widths(errors, costs, budget)
    taken = float(costs[choice].sum())
    assert taken <= budget

    def price(chosen: tuple[int, ...]) -> tuple[float, float]:
        return sum(float(costs[c]) for c in chosen), sum(float(errors[n, c]) for n, c in enumerate(chosen))

    best = min(lost for cost, lost in map(price, itertools.product(range(3), repeat=4)) if cost <= taken)
    assert price(tuple(choice.tolist()))[1] == pytest.approx(best)
