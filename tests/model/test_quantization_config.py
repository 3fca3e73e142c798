from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from transformers.quantizers import AutoQuantizationConfig

from globe.errors import CheckpointError, GlobeError
from globe.model.bank_spec import BankSpec
from globe.model.coded_spec import CodedSpec
from globe.model.quantization_config import GlobeQuantizationConfig

BANK: dict[str, Any] = {
    "layers": [0],
    "families": ["gate", "up", "down"],
    "rank": 48,
    "num_bases": 18,
}
CODED: dict[str, Any] = {
    "layer": 3,
    "family": "down",
    "payload": 4096,
    "shared": False,
    "scaled": True,
    "num_bases": 0,
    "bases_payload": 0,
}
SECTION: dict[str, Any] = {
    "quant_method": "globe",
    "format_version": 2,
    "globe_version": "0.1.0",
    "activation": "tanh",
    "banks": [BANK, {**BANK, "layers": [1, 2, 5], "families": ["gate", "up"]}],
    "coded": [CODED, {**CODED, "family": "gate", "shared": True}],
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
    assert config.coded == (
        CodedSpec(3, "down", 4096, shared=False, scaled=True),
        CodedSpec(3, "gate", 4096, shared=True, scaled=True),
    )
    assert config.coded_of(3) == list(config.coded)
    assert config.coded_of(0) == []
    assert [bank.name for bank in config.banks_of(2)] == ["layers_1_5_gate_up"]


def test_says_what_is_compressed() -> None:
    config = GlobeQuantizationConfig.from_dict(SECTION)
    in_banks = {(0, "gate"), (0, "up"), (0, "down")} | {(layer, f) for layer in (1, 2, 5) for f in ("gate", "up")}
    assert sorted(config.compressed) == sorted(in_banks | {(3, "down"), (3, "gate")})
    coded_alone = GlobeQuantizationConfig(coded=[CODED])
    assert coded_alone.compressed == [(3, "down")]
    assert coded_alone.to_dict()["banks"] == []


def test_round_trips_with_unknown_keys() -> None:
    entries = {"banks": [{**BANK, "note": [1, 2]}], "coded": [{**CODED, "note": "x"}]}
    section = {**SECTION, "inner": {"quant_method": "other"}, **entries}
    config = GlobeQuantizationConfig.from_dict(section)
    assert json.loads(config.to_json_string()) == section
    assert copy.deepcopy(config).to_dict() == section


def test_a_spec_is_a_value() -> None:
    spec = BankSpec((0,), ("up",), rank=2, num_bases=3)
    assert {spec, dataclasses.replace(spec)} == {spec}
    assert BankSpec.from_dict(spec.to_dict()) == spec
    coded = CodedSpec(1, "up", 10, shared=True, scaled=False)
    assert {coded, dataclasses.replace(coded)} == {coded}
    assert CodedSpec.from_dict(coded.to_dict()) == coded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, r"format_version 2; found 1\. Install the version of globe-moe that wrote"),
        ({"format_version": 3}, r"format_version 2; found 3\. Install the version of globe-moe that wrote"),
        ({"format_version": "2"}, "found '2'"),
        ({"format_version": True}, "found True"),
        ({"activation": "relu"}, "activation 'relu' is unknown"),
        ({"banks": [], "coded": []}, "no banks and nothing coded"),
        ({"banks": None}, "banks must be a list; found None"),
        ({"coded": None}, "coded must be a list; found None"),
        ({"banks": [BANK, {**BANK, "families": ["up"]}]}, "up of layer 0 is twice .* bank gate_up_down and in bank up"),
        ({"banks": [{**BANK, "layers": [0, 1]}, {**BANK, "layers": [1]}]}, "gate of layer 1 is twice"),
        ({"coded": [CODED, CODED]}, "down of layer 3 is twice in config.json: in what is coded and in what is coded"),
        ({"coded": [{**CODED, "layer": 0}]}, "down of layer 0 is twice .* bank gate_up_down and in what is coded"),
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
    ],
)
def test_refuses_a_bank_it_cannot_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        BankSpec.from_dict({**BANK, **change})


@pytest.mark.parametrize("missing", sorted(BANK))
def test_refuses_a_bank_with_a_field_missing(missing: str) -> None:
    with pytest.raises(CheckpointError, match=missing):
        BankSpec.from_dict({key: value for key, value in BANK.items() if key != missing})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": -1}, "layer must be from 0 to 1048576; found -1"),
        ({"layer": "0"}, "layer is '0'; it must be a whole number"),
        ({"family": "router"}, "must be one of gate, up, down; found 'router'"),
        ({"payload": -1}, "payload must be from 0 to"),
        ({"payload": 2**60}, "payload must be from 0 to"),
        ({"payload": 1.5}, "payload is 1.5; it must be a whole number"),
        ({"shared": 1}, "shared is 1; it must be true or false"),
        ({"scaled": None}, "scaled is None; it must be true or false"),
    ],
)
def test_refuses_a_coded_family_it_cannot_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CodedSpec.from_dict({**CODED, **change})


@pytest.mark.parametrize("missing", sorted(CODED))
def test_refuses_a_coded_family_with_a_field_missing(missing: str) -> None:
    with pytest.raises(CheckpointError, match=missing):
        CodedSpec.from_dict({key: value for key, value in CODED.items() if key != missing})
