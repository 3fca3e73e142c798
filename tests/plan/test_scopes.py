from __future__ import annotations

import dataclasses
import json

import pytest

from globe.bank_shape import BankShape
from globe.errors import SettingsError
from globe.plan.scopes import (
    Scope,
    compact,
    make_plan,
    scope_from_json,
)
from globe.plan.settings import CompressConfig


@dataclasses.dataclass(frozen=True)
class Layer:
    index: int
    num_experts: int = 4
    intermediate_size: int = 6
    hidden_size: int = 16


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(0,), (1,), (2,), (3,), (5,)]),
        ({"scope": "model"}, [(0, 1, 2, 3, 5)]),
        ({"scope": "2"}, [(0, 1), (2, 3), (5,)]),
        ({"scope": "model", "max_experts": 24}, [(0, 1), (2, 3), (5,)]),
        ({"layers": (5, 1)}, [(1,), (5,)]),
    ],
)
def test_scopes_are_runs_of_the_layers_that_hold_experts(
    settings: dict[str, object], expected: list[tuple[int, ...]]
) -> None:
    layers = [Layer(index) for index in (0, 1, 2, 3, 5)]
    scopes = make_plan(layers, CompressConfig(keep=0.7, **settings))  # pyright: ignore[reportArgumentType]
    assert [scope.layers for scope in scopes] == expected


def test_families_share_a_bank_or_have_their_own() -> None:
    together = make_plan([Layer(0)], CompressConfig(keep=0.7))[0].banks
    assert [(bank.families, bank.shape.matrices) for bank in together] == [(("gate", "up", "down"), (12, 6, 16))]
    apart = make_plan([Layer(0)], CompressConfig(keep=0.7, share_families=False))[0].banks
    assert [bank.families for bank in apart] == [("gate",), ("up",), ("down",)]
    assert [bank.shape.matrices for bank in apart] == [(4, 6, 16)] * 3


def test_ratios_set_the_shape_directly() -> None:
    (scope,) = make_plan([Layer(0)], CompressConfig(rank_ratio=0.5, basis_ratio=0.25))
    assert scope.banks[0].shape == BankShape(12, 6, 16, rank=3, num_bases=3)


def test_a_rank_above_the_columns_is_refused_before_any_work() -> None:
    coarse = [Layer(0, intermediate_size=64, hidden_size=16)]
    with pytest.raises(SettingsError, match="16 columns"):
        make_plan(coarse, CompressConfig(rank_ratio=0.5, basis_ratio=0.5))


def test_experts_of_different_shapes_do_not_share_a_bank() -> None:
    layers = [Layer(0), Layer(1, intermediate_size=8)]
    with pytest.raises(SettingsError, match="different shapes"):
        make_plan(layers, CompressConfig(keep=0.7, scope="model"))
    assert len(make_plan(layers, CompressConfig(keep=0.7))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_ratio": 0.5}, "go together"),
        ({"keep": 0.5, "rank_ratio": 0.5, "basis_ratio": 0.5}, "give one of keep, bits"),
        ({"rank_ratio": 1.5, "basis_ratio": 0.5}, "at most 1"),
        ({"keep": 0.5, "bits": 3}, "give one of keep, bits"),
        ({"bits": 3, "rank_ratio": 0.5, "basis_ratio": 0.5}, "give one of keep, bits"),
        ({"bits": 3, "scope": "model"}, "scope is a setting of banks"),
        ({"keep": 0.5, "factor_dtype": "int4"}, "factor_dtype 'int4' is unknown"),
        ({"families": ("gate", "side")}, "side"),
        ({"families": ()}, "none"),
        ({"scope": "half"}, "half"),
        ({"activation": "gelu"}, "gelu"),
        ({"codes": "topk"}, "topk"),
    ],
)
def test_settings_at_odds_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CompressConfig(**settings)  # pyright: ignore[reportArgumentType]


def test_indices_are_shown_as_runs() -> None:
    assert compact([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert compact([]) == "none"


def test_coded_layers_are_scopes_without_banks() -> None:
    scopes = make_plan([Layer(0), Layer(3, intermediate_size=8)], CompressConfig(bits=3))
    assert scopes == [Scope((0,), ()), Scope((3,), ())]


@pytest.mark.parametrize("settings", [{"bits": 3}, {"keep": 0.7, "share_families": False}], ids=str)
def test_scopes_come_back_from_their_record(settings: dict[str, object]) -> None:
    scopes = make_plan([Layer(0), Layer(3, intermediate_size=8)], CompressConfig(**settings))  # pyright: ignore[reportArgumentType]
    assert [scope_from_json(json.loads(json.dumps(dataclasses.asdict(scope)))) for scope in scopes] == scopes
