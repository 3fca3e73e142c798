from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from globe.plan.allocate import ErrorCurve, allocate
from globe.plan.budget import Keep
from globe.plan.scopes import Scope, make_plan
from globe.plan.settings import CompressConfig


@dataclasses.dataclass(frozen=True)
class Layer:
    index: int
    num_experts: int = 16
    intermediate_size: int = 48
    hidden_size: int = 128


LAYERS = [Layer(index) for index in range(4)]
SENSITIVITIES = [8.0, 1.0, 1.0, 3.0]


def stored(scopes: list[Scope]) -> int:
    return sum(bank.shape.parameters for scope in scopes for bank in scope.banks)


def allocated(keep: float, sensitivities: list[float] = SENSITIVITIES) -> tuple[list[Scope], list[Scope]]:
    scopes = make_plan(LAYERS, CompressConfig(keep=keep))
    curves = [ErrorCurve(keep, 0.3, 6.0)] * len(scopes)
    return scopes, allocate(scopes, curves, sensitivities, Keep(keep))


@pytest.mark.parametrize("keep", [0.75, 0.625, 0.5, 0.35])
def test_the_budget_is_that_of_the_uniform_plan_within_a_basis(keep: float) -> None:
    uniform, chosen = allocated(keep)
    assert [scope.layers for scope in chosen] == [scope.layers for scope in uniform]
    shapes = [bank.shape for scope in chosen for bank in scope.banks]
    basis = max(shape.rank * shape.columns + shape.num_matrices for shape in shapes)
    assert stored(uniform) - basis <= stored(chosen) <= stored(uniform)


def test_sensitive_banks_get_more() -> None:
    _, chosen = allocated(0.5)
    sizes = [scope.banks[0].shape.parameters for scope in chosen]
    errors = [scope.banks[0].predicted_error for scope in chosen]
    assert sizes[0] > sizes[3] > sizes[1]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] < errors[1]


def test_a_larger_budget_is_larger_for_every_bank() -> None:
    plans = [allocated(keep)[1] for keep in (0.35, 0.5, 0.625, 0.75)]
    for smaller, larger in itertools.pairwise(plans):
        for one, other in zip(smaller, larger, strict=True):
            assert one.banks[0].shape.parameters < other.banks[0].shape.parameters


def test_a_bank_of_zeros_leaves_its_budget_to_the_others() -> None:
    scopes = make_plan(LAYERS, CompressConfig(keep=0.5))
    curves = [ErrorCurve(0.5, 0.0, 0.0), *[ErrorCurve(0.5, 0.3, 6.0)] * 3]
    chosen = [scope.banks[0] for scope in allocate(scopes, curves, [0.0, 1.0, 1.0, 1.0], Keep(0.5))]
    assert chosen[0].predicted_error == 0
    assert chosen[0].shape.parameters < scopes[0].banks[0].shape.parameters
    assert all(bank.shape.parameters > scopes[0].banks[0].shape.parameters for bank in chosen[1:])


def test_without_any_sensitivity_the_errors_alone_decide() -> None:
    assert allocated(0.5, [0.0] * 4)[1] == allocated(0.5, [1.0] * 4)[1]


def test_a_curve_is_no_more_than_1_however_steep() -> None:
    assert ErrorCurve(0.5, 0.3, 1e5)(0.1) == 1.0
    assert ErrorCurve(0.5, 0.3, 1e5)(0.9) == 0.0


def test_a_curve_is_its_formula() -> None:
    for share in (0.05, 0.4, 0.7, 0.99):
        short = 0.3 * math.exp(2.0 * (0.4 - share))
        assert ErrorCurve(0.4, 0.3, 2.0)(share) == pytest.approx(short)
        gained = short * math.exp(-0.2 * share / math.sqrt(1 - share))
        assert ErrorCurve(0.4, 0.3, 2.0, 0.2)(share) == pytest.approx(gained)


# against the continuous optimum


FINE = [Layer(index, num_experts=64, intermediate_size=96, hidden_size=256) for index in range(4)]
"""Of which every share that is asked for can nearly be had."""


def shares_and_errors(keep: float, slopes: list[float], sensitivities: list[float]) -> list[tuple[float, float]]:
    scopes = make_plan(FINE[: len(slopes)], CompressConfig(keep=keep))
    curves = [ErrorCurve(keep, 0.2, slope) for slope in slopes]
    banks = [scope.banks[0] for scope in allocate(scopes, curves, sensitivities, Keep(keep))]
    return [(bank.shape.share, bank.predicted_error or 0.0) for bank in banks]


def test_every_bank_saves_the_same_per_parameter() -> None:
    """Σ s^0.8 err³ with err = 0.2 exp(slope (keep − k)) is smallest where 3 slope s^0.8 err³ is one number for all."""
    slopes = [5.0, 4.0, 6.0, 5.0]
    for sensitivities in ([1.0] * 4, [1.0, 1.0, 100.0, 400.0]):
        found = shares_and_errors(0.5, slopes, sensitivities)
        assert sum(share for share, _ in found) == pytest.approx(4 * 0.5, abs=0.01)
        wanted = [
            -(math.log(slope) + 0.8 * math.log(each)) / 3 for slope, each in zip(slopes, sensitivities, strict=True)
        ]
        wanted = [each - sum(wanted) / 4 for each in wanted]
        errors = [math.log(error) for _, error in found]
        mean = sum(errors) / 4
        assert [each - mean for each in errors] == pytest.approx(wanted, abs=6 * 0.005)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_a_bank_gives_and_takes_half_of_what_is_there(keep: float) -> None:
    """As far as the curve of its errors was measured to hold, whatever its sensitivity."""
    (most, _), (least, _) = shares_and_errors(keep, [5.0, 5.0], [1e12, 1e-12])
    reach = min(keep, 1 - keep) / 2
    assert (least, most) == pytest.approx((keep - reach, keep + reach), abs=0.008)


def test_shares_are_offered_in_steps_of_half_a_percent() -> None:
    """Of the parameters: as the sensitivity rises a bank's share rises through all of them."""
    found = [shares_and_errors(0.5, [5.0, 5.0], [1.02**number, 1.0])[0][0] for number in range(120)]
    assert found == sorted(found)
    steps = [later - earlier for earlier, later in itertools.pairwise(found) if later > earlier]
    assert max(steps) < 0.0075
    assert min(steps) > 0.0025
