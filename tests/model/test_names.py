from __future__ import annotations

import pytest

from globe.model.bank_spec import BankSpec
from globe.model.names import FactorNames, dense_halves

NAMES = FactorNames(experts={layer: f"model.layers.{layer}.mlp.experts" for layer in range(4)}, base="model")


def spec(layers: tuple[int, ...], families: tuple[str, ...]) -> BankSpec:
    return BankSpec(layers, families, rank=2, num_bases=3)


def test_names_of_the_format() -> None:
    assert NAMES.adapters(1, "gate") == "model.layers.1.mlp.experts.globe_gate_adapters"
    assert NAMES.codes(1, "down") == "model.layers.1.mlp.experts.globe_down_codes"
    assert NAMES.dense(1, "up") == "model.layers.1.mlp.experts.globe_up_dense"
    assert NAMES.coded(1, "down", "payload") == "model.layers.1.mlp.experts.globe_down_payload"
    own, shared = spec((2,), ("gate", "up")), spec((1, 3), ("down",))
    assert NAMES.bases(own) == "model.layers.2.mlp.experts.globe_banks.gate_up.bases"
    assert NAMES.bases(shared) == "model.globe_banks.layers_1_3_down.bases"


def test_a_model_that_is_its_own_base() -> None:
    names = FactorNames(experts={0: "layers.0.mlp.experts", 1: "layers.1.mlp.experts"}, base="")
    assert names.bases(spec((0, 1), ("up",))) == "globe_banks.layers_0_1_up.bases"


@pytest.mark.parametrize(
    ("compressed", "expected"),
    [
        ([(1, "up"), (0, "down")], "model.layers.0.mlp.experts.down_proj"),
        ([(0, "down"), (0, "gate")], "model.layers.0.mlp.experts.gate_up_proj"),
        ([(3, "down"), (2, "gate"), (2, "up"), (2, "down")], "model.layers.2.mlp.experts.gate_up_proj"),
    ],
)
def test_the_tripwire_is_in_the_first_compressed_layer(compressed: list[tuple[int, str]], expected: str) -> None:
    assert NAMES.tripwire(compressed) == expected


@pytest.mark.parametrize(
    ("families", "halves"),
    [({"up"}, ["gate"]), ({"gate", "down"}, ["up"]), ({"gate", "up"}, []), ({"down"}, []), (set[str](), [])],
)
def test_dense_halves(families: set[str], halves: list[str]) -> None:
    assert dense_halves(families) == halves
