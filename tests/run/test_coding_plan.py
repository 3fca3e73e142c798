"""How bits are shared out among the rows of a model, and the record of it."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from globe import CompressConfig, SettingsError
from globe.experts import coding as coding_module
from globe.experts.coding import damped
from globe.quant.coded import Rehearsal, rehearse
from globe.run import outline as outline_module
from globe.run.coding import code_family, measured_sensitivities, plan_coding, plan_from_json, plan_to_json
from globe.run.job import Job, make_job
from globe.run.outline import check_reach
from globe.run.records import as_json
from globe.terms import FAMILIES
from tests.coded import ALONE, LAYERS, D, E, P, rewrite, write_source
from tests.random_experts import normal

WEIGHTS = LAYERS * 3 * E * P * D


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "source"
    write_source(folder)
    return folder


@pytest.fixture(scope="module")
def job(source: Path) -> Job:
    return make_job(source, ALONE)


def test_a_record_of_a_plan_is_the_plan_exactly(job: Job) -> None:
    equal = measured_sensitivities(job, None)[0]
    sensitivities = {key: normal(*each.shape, seed=7).exp().float() for key, each in equal.items()}
    plan = plan_coding(job, None, sensitivities)
    record = json.loads(json.dumps(as_json(plan_to_json(plan)), allow_nan=False))
    assert plan_from_json(record) == plan


@pytest.mark.parametrize("bits", [1.7, 3, 5.5])
def test_what_is_planned_is_what_is_stored(source: Path, bits: float) -> None:
    job = make_job(source, dataclasses.replace(ALONE, bits=bits))
    sensitivities = measured_sensitivities(job, None)[0]
    plan = plan_coding(job, None, sensitivities)
    coded = [code_family(job, plan, None, sensitivities, *key) for key in sensitivities]
    assert sum(each.experts.num_bytes for each in coded) == plan.num_bytes
    assert 0.995 * bits <= 8 * plan.num_bytes / WEIGHTS <= bits
    assert {(each.spec.family, each.spec.shared, each.spec.scaled) for each in coded} == {
        ("gate", True, False),
        ("up", True, True),
        ("down", False, False),
    }


def test_equal_sensitivities_where_that_is_asked_for(job: Job) -> None:
    found, because = measured_sensitivities(job, None)
    assert because == "that is asked for"
    assert found.keys() == {(layer, family) for layer in range(LAYERS) for family in ("gate", "up", "down")}
    for (_, family), each in found.items():
        assert torch.equal(each, torch.ones(E, D if family == "down" else P))


def test_sensitivities_are_measured_for_what_is_coded_alone(source: Path) -> None:
    config = CompressConfig(bits=3, calibrate="none", families=("up",), layers=(1,))
    found, because = measured_sensitivities(make_job(source, config), None)
    assert because is None
    assert found.keys() == {(1, "up")}
    assert bool((found[1, "up"] > 0).all())


def test_more_sensitive_experts_get_more_bits(job: Job) -> None:
    """By one multiplier: four times the importance is one bit, whatever layer and family."""
    equal = measured_sensitivities(job, None)[0]
    weighted = {key: each.clone() for key, each in equal.items()}
    weighted[1, "down"][3] = 60.0
    importance = damped(weighted)
    gained = {}
    for name, sensitivities in (("equal", equal), ("weighted", weighted)):
        plan = plan_coding(job, None, sensitivities)
        down = code_family(job, plan, None, sensitivities, 1, "down")
        gained[name] = torch.tensor(down.report.expert_widths)
    more = gained["weighted"] - gained["equal"]
    ratio = float(importance[1, "down"][3].sum() / importance[1, "down"][0].sum())
    expected = 0.5 * torch.tensor(ratio).log2()
    others = [expert for expert in range(E) if expert != 3]
    assert float(more[3] - more[others].mean()) == pytest.approx(float(expected), abs=0.25)
    assert bool((more[others] <= 0.01).all())


def test_a_layer_is_coded_from_the_record_as_from_the_plan(job: Job) -> None:
    sensitivities = measured_sensitivities(job, None)[0]
    plan = plan_coding(job, None, sensitivities)
    again = plan_from_json(json.loads(json.dumps(plan_to_json(plan))))
    for family in FAMILIES:
        one, two = (code_family(job, each, None, sensitivities, 1, family).experts for each in (plan, again))
        assert torch.equal(one.rest.payload, two.rest.payload)


def test_what_rehearsals_found_is_used_again_unless_it_was_damaged(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensitivities = measured_sensitivities(job, None)[0]
    plan, kept = plan_coding(job, None, sensitivities), plan_coding(job, None, sensitivities, folder=tmp_path)
    assert dataclasses.replace(kept, rehearsals=None) == plan
    assert plan_from_json(plan_to_json(kept), tmp_path) == kept
    rehearsed = list[int]()

    def count(rows: torch.Tensor, *rest: Any) -> Rehearsal:
        rehearsed.append(len(rows))
        return rehearse(rows, *rest)

    monkeypatch.setattr(coding_module, "rehearse", count)
    for family in FAMILIES:
        expected = code_family(job, plan, None, sensitivities, 1, family)
        assert rehearsed.pop() == E
        found = code_family(job, kept, None, sensitivities, 1, family)
        assert not rehearsed
        path = tmp_path / f"rehearsal-1-{family}.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        again = code_family(job, kept, None, sensitivities, 1, family)
        assert rehearsed.pop() == E
        for each in (found, again):
            assert torch.equal(each.experts.rest.payload, expected.experts.rest.payload)
            assert each.report.error == expected.report.error


def test_bits_below_widths_and_scales_are_out_of_reach(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(source, dataclasses.replace(ALONE, bits=2))
    check_reach(job)
    more = E * P * D // 4 + 1  # than two bits a weight
    monkeypatch.setattr(outline_module, "_least_side_bytes", lambda *_: more)
    with pytest.raises(SettingsError, match=r"bits 2 is out of reach: .* take 2\.00 bits a weight"):
        check_reach(job)


def test_what_lies_beside_the_paths_can_take_more_than_the_least(tmp_path: Path) -> None:
    """Rows that are no products, which have widths and scales of their own."""

    def uneven(name: str, tensor: torch.Tensor) -> torch.Tensor:
        sizes = normal(tensor.shape[-1], seed=zlib.crc32(name.encode())).exp()
        return tensor * sizes.to(tensor) if ".experts." in name else tensor

    write_source(tmp_path / "source", moe_intermediate_size=2)
    rewrite(tmp_path / "source", uneven)
    job = make_job(tmp_path / "source", dataclasses.replace(ALONE, bits=1.5))
    check_reach(job)
    own = (2 * (D + D // 2 + 2) + 2 + 1 + 2) / (3 * 2 * D)  # bytes a weight
    with pytest.raises(SettingsError, match=rf"bits 1\.5 is out of reach: .* take {8 * own:.2f} bits a weight"):
        plan_coding(job, None, measured_sensitivities(job, None)[0])
