from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from transformers.quantizers import AutoQuantizationConfig

from globe.errors import CheckpointError, GlobeError
from globe.model import BankSpec, GlobeQuantizationConfig

BANK: dict[str, Any] = {
    "layers": [0],
    "families": ["gate", "up", "down"],
    "rank": 48,
    "num_bases": 18,
    "encoding": {"bases": "plain", "codes": "plain", "adapters": "plain"},
}
SECTION: dict[str, Any] = {
    "quant_method": "globe",
    "format_version": 1,
    "globe_version": "0.1.0",
    "activation": "tanh",
    "banks": [BANK, {**BANK, "layers": [1, 2, 5], "families": ["gate", "up"]}],
}


def test_parses_the_section_of_config_json() -> None:
    config = AutoQuantizationConfig.from_dict(SECTION)
    assert isinstance(config, GlobeQuantizationConfig)
    assert config.activation == "tanh"
    assert config.banks == (
        BankSpec((0,), ("gate", "up", "down"), rank=48, num_bases=18),
        BankSpec((1, 2, 5), ("gate", "up"), rank=48, num_bases=18),
    )
    assert [bank.shared for bank in config.banks] == [False, True]
    assert [bank.name for bank in config.banks] == ["gate_up_down", "layers_1_5_gate_up"]


def test_round_trips_with_unknown_keys() -> None:
    section = {**SECTION, "inner": {"quant_method": "other"}, "banks": [{**BANK, "note": [1, 2]}]}
    config = GlobeQuantizationConfig.from_dict(section)
    assert json.loads(config.to_json_string()) == section
    assert copy.deepcopy(config).to_dict() == section


def test_a_spec_is_a_value() -> None:
    spec = BankSpec((0,), ("up",), rank=2, num_bases=3)
    assert {spec, dataclasses.replace(spec)} == {spec}
    assert BankSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 1; found 2"),
        ({"activation": "relu"}, "activation 'relu' is unknown"),
        ({"banks": []}, "no banks"),
        ({"banks": None}, "must be a list; found None"),
        ({"banks": [BANK, {**BANK, "families": ["up"]}]}, "up of layer 0 is in two banks: gate_up_down and up"),
        ({"banks": [{**BANK, "layers": [0, 1]}, {**BANK, "layers": [1]}]}, "gate of layer 1 is in two banks"),
    ],
)
def test_refuses_a_section_it_cannot_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(GlobeError, match=message):
        GlobeQuantizationConfig.from_dict({**SECTION, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "increasing layer numbers"),
        ({"layers": [2, 1]}, "increasing layer numbers"),
        ({"layers": [-1]}, "increasing layer numbers"),
        ({"layers": ["0"]}, r"layers\[0\] is '0'; it must be a whole number"),
        ({"families": []}, "some of gate, up, down"),
        ({"families": ["up", "gate"]}, "in this order"),
        ({"families": ["router"]}, r"found \['router'\]"),
        ({"rank": 0}, "rank must be a positive int, of 1048576 at most; found 0"),
        ({"rank": [48, 32]}, r"rank is \[48, 32\]; it must be a whole number"),
        ({"num_bases": True}, "num_bases is True; it must be a whole number"),
        ({"encoding": {**BANK["encoding"], "bases": "int7"}}, "'bases': 'int7'"),
        ({"encoding": {"bases": "plain"}}, "reads encodings"),
        ({"encoding": None}, "encoding is None; it must be an object"),
    ],
)
def test_refuses_a_bank_it_cannot_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        BankSpec.from_dict({**BANK, **change})


@pytest.mark.parametrize("missing", sorted(BANK))
def test_refuses_a_bank_with_a_field_missing(missing: str) -> None:
    with pytest.raises(CheckpointError, match=missing):
        BankSpec.from_dict({key: value for key, value in BANK.items() if key != missing})
