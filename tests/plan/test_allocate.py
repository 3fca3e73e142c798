from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from globe.plan.allocate import ErrorCurve, allocate
from globe.plan.scopes import Scope, make_plan
from globe.plan.settings import CompressConfig
from globe.run.allocation import measure_curve


@dataclasses.dataclass(frozen=True)
class Layer:
    index: int
    num_experts: int = 16
    intermediate_size: int = 48
    hidden_size: int = 128


LAYERS = [Layer(index) for index in range(4)]
SENSITIVITIES = [8.0, 1.0, 1.0, 3.0]


def stored(scopes: list[Scope]) -> int:
    return sum(bank.stored_parameters for scope in scopes for bank in scope.banks)


def allocated(keep: float, sensitivities: list[float] = SENSITIVITIES) -> tuple[list[Scope], list[Scope]]:
    scopes = make_plan(LAYERS, CompressConfig(keep=keep))
    curves = [ErrorCurve(keep, 0.3, 6.0)] * len(scopes)
    return scopes, allocate(scopes, curves, sensitivities, keep)


@pytest.mark.parametrize("keep", [0.75, 0.625, 0.5, 0.35])
def test_the_budget_is_that_of_the_uniform_plan_within_a_basis(keep: float) -> None:
    uniform, chosen = allocated(keep)
    assert [scope.layers for scope in chosen] == [scope.layers for scope in uniform]
    basis = max(bank.rank * bank.columns + bank.num_matrices for scope in chosen for bank in scope.banks)
    assert stored(uniform) - basis <= stored(chosen) <= stored(uniform)


def test_sensitive_banks_get_more() -> None:
    _, chosen = allocated(0.5)
    sizes = [scope.banks[0].stored_parameters for scope in chosen]
    errors = [scope.banks[0].predicted_error for scope in chosen]
    assert sizes[0] > sizes[3] > sizes[1]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[0] < errors[1]


def test_a_larger_budget_is_larger_for_every_bank() -> None:
    plans = [allocated(keep)[1] for keep in (0.35, 0.5, 0.625, 0.75)]
    for smaller, larger in itertools.pairwise(plans):
        for one, other in zip(smaller, larger, strict=True):
            assert one.banks[0].stored_parameters < other.banks[0].stored_parameters


def test_two_short_fits_tell_level_and_slope() -> None:
    layer = Layer(0, num_experts=4, intermediate_size=6, hidden_size=16)
    config = CompressConfig(keep=0.6)
    (scope,) = make_plan([layer], config)
    experts = torch.randn(12, 6, 16, generator=torch.Generator().manual_seed(0))
    curve = measure_curve(experts, scope.banks[0], config)
    assert curve.slope > 0
    assert curve(0.7) < curve(0.6) < curve(0.5) <= 1


def test_a_bank_of_zeros_leaves_its_budget_to_the_others() -> None:
    scopes = make_plan(LAYERS, CompressConfig(keep=0.5))
    curves = [ErrorCurve(0.5, 0.0, 0.0), *[ErrorCurve(0.5, 0.3, 6.0)] * 3]
    chosen = [scope.banks[0] for scope in allocate(scopes, curves, [0.0, 1.0, 1.0, 1.0], 0.5)]
    assert chosen[0].predicted_error == 0
    assert chosen[0].stored_parameters < scopes[0].banks[0].stored_parameters
    assert all(bank.stored_parameters > scopes[0].banks[0].stored_parameters for bank in chosen[1:])


def test_without_any_sensitivity_the_errors_alone_decide() -> None:
    assert allocated(0.5, [0.0] * 4)[1] == allocated(0.5, [1.0] * 4)[1]


def test_the_curve_of_zeros_is_zero() -> None:
    (scope,) = make_plan([Layer(0)], CompressConfig(keep=0.5))
    curve = measure_curve(torch.zeros(48, 48, 128), scope.banks[0], CompressConfig(keep=0.5))
    assert (curve.level, curve.slope, curve(0.1), curve(0.9)) == (0.0, 0.0, 0.0, 0.0)


def test_a_curve_is_no_more_than_1_however_steep() -> None:
    assert ErrorCurve(0.5, 0.3, 1e5)(0.1) == 1.0
    assert ErrorCurve(0.5, 0.3, 1e5)(0.9) == 0.0


def test_the_least_bank_has_a_flat_curve() -> None:
    """There is no smaller one to measure its slope with."""
    config = CompressConfig(keep=0.017, steps=2)
    (scope,) = make_plan([Layer(0, num_experts=1)], config)
    assert (scope.banks[0].rank, scope.banks[0].num_bases) == (1, 1)
    curve = measure_curve(torch.randn(3, 48, 128), scope.banks[0], config)
    assert curve.level > 0
    assert curve.slope == 0
