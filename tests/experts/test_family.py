"""A family in parts against the same family as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer
from globe.experts import family as module
from globe.experts.coding import CodingProblem
from globe.experts.family import ExpertFamily, joined
from globe.experts.metric import LayerStatistics
from globe.quant.coded import CodedExperts
from globe.quant.water_fill import UNIT
from globe.terms import FAMILIES, Family
from tests.random_experts import normal, second_moment

E, P, D = 7, 64, 96
ANY: Any = None


@pytest.fixture(params=FAMILIES)
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ExpertFamily:
    """Experts with outputs of very different sizes, and half of what they are in common."""
    name: Family = request.param
    layer = ExpertLayer(3, "experts", "fused", ("gate", "up", "down"), E, P, D, "F32")
    own = normal(E, P, D, seed=1) * (3 * normal(1, P, 1, seed=2)).exp2() * (3 * normal(1, 1, D, seed=3)).exp2()
    stack = (own + 2 * own[:1]).float()

    def read(_checkpoint: Any, _layer: Any, _family: Any, experts: slice = slice(None)) -> Tensor:
        X = stack[experts]
        return X.clone() if name == "down" else X.mT.contiguous()

    monkeypatch.setattr(module, "read_experts", read)
    inner = torch.stack([second_moment(P, seed=expert) for expert in range(E)]).float()
    rows: dict[Family, Tensor] = {family: torch.ones(E, P) for family in FAMILIES}
    known = LayerStatistics(50, second_moment(D).float(), torch.ones(E), rows, inner)
    sensitivities = normal(E, D if name == "down" else P, seed=4).square().float()
    return ExpertFamily(ANY, layer, name, known, sensitivities)


def problems(family: ExpertFamily) -> list[CodingProblem]:
    return family.by_part(lambda _, problem: problem)


def in_parts(whole: ExpertFamily, monkeypatch: pytest.MonkeyPatch) -> ExpertFamily:
    assert whole.parts == [slice(0, E)]
    monkeypatch.setattr(module, "MOST_WEIGHTS", 2 * P * D)
    return ExpertFamily(whole.checkpoint, whole.layer, whole.family, whole.statistics, whole.sensitivities)


def test_parts_are_of_nearly_as_many_experts_each(whole: ExpertFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whole.parts == [slice(0, E)]
    parts = in_parts(whole, monkeypatch)
    assert parts.parts == [slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 7)]
    monkeypatch.setattr(module, "LONG_ROW", 1000)  # shorter rows may share their widths with those of all experts
    assert in_parts(whole, monkeypatch).parts == [slice(0, E)]


def test_what_is_planned_is_that_of_the_whole(whole: ExpertFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = in_parts(whole, monkeypatch)
    (one,), many = problems(whole), problems(parts)
    assert one.outputs.exponents is not None
    for part, each in zip(parts.parts, many, strict=True):
        assert each.outputs.exponents is not None
        assert torch.equal(each.outputs.exponents, one.outputs.exponents[part])
    assert sum(each.side_bytes for each in many) == one.side_bytes
    costs = joined([each.rows() for each in many])
    assert costs.length == one.rows().length
    assert (costs.costs - one.rows().costs).abs().max() <= 1
    torch.testing.assert_close(torch.cat([each.importance for each in many]), one.importance)


def test_an_expert_by_itself_is_coded_in_the_order_of_its_own_inputs(
    whole: ExpertFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WEIGHTS", P * D)
    alone = ExpertFamily(whole.checkpoint, whole.layer, whole.family, whole.statistics, whole.sensitivities)
    assert len(alone.parts) == E
    monkeypatch.setattr(module, "MOST_WEIGHTS", E * P * D)
    (one,) = problems(whole)
    for expert, each in enumerate(problems(alone)):
        row = expert if whole.family == "down" else 0
        assert torch.equal(each.order.inputs[0], one.order.inputs[row])
        torch.testing.assert_close(each.order.prices[0], one.order.prices[row])
    costs = joined([each.rows() for each in problems(alone)])
    assert (costs.costs - one.rows().costs).abs().max() <= 1


def test_parts_of_which_nothing_is_known_share_a_bank(whole: ExpertFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = ExpertFamily(whole.checkpoint, whole.layer, whole.family, None, whole.sensitivities)
    expected = unknown.find_bank(-40 * UNIT, 1)
    found = in_parts(unknown, monkeypatch).find_bank(-40 * UNIT, 1)
    assert expected is not None
    assert found is not None
    norms = [float(each.bases.decode().norm()) for each in (expected, found)]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_what_is_coded_is_as_good_and_decoded_as_one(whole: ExpertFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = in_parts(whole, monkeypatch)
    (one,) = problems(whole)
    multiplier = int(one.rows().costs.median()) - 6 * UNIT
    found = [each.rehearsed(multiplier).code(multiplier) for each in problems(parts)]
    coded = CodedExperts.cat([each for each, _ in found])
    assert coded.is_sound()
    assert torch.equal(coded.decode(), torch.cat([decoded for _, decoded in found]))
    expected, decoded = one.rehearsed(multiplier).code(multiplier)
    assert CodedExperts.cat([expected]) is expected
    assert coded.num_bytes == pytest.approx(expected.num_bytes, rel=0.01)
    error, least = ((each - one.X).norm() for each in (coded.decode(), decoded))
    assert float(error) == pytest.approx(float(least), rel=0.05)


def test_so_many_outputs_tell_what_experts_have_in_common() -> None:
    assert module.telling_step(16, 128, 48, 1) == 1
    assert module.telling_step(128, 2048, 768, 2) == 12  # 64 of 768
    assert module.telling_step(32, 2048, 2048, 1) == 8  # 2²⁴ weights
    assert module.telling_step(384, 7168, 2048, 42) == 42  # no more than a part has


@pytest.mark.parametrize("is_large", [False, True])
def test_a_bank_is_found_from_some_of_the_outputs(
    whole: ExpertFamily, monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    multiplier = -40 * UNIT
    expected = whole.find_bank(multiplier, 1)
    if is_large:
        monkeypatch.setattr(module, "_TELLING", E * P * D // 4)
        monkeypatch.setattr(module, "_FEWEST", 16)
        parts = whole
    else:
        parts = in_parts(whole, monkeypatch)
    found = parts.find_bank(multiplier, 1)
    assert expected is not None
    assert found is not None
    assert parts.find_bank(multiplier, 0) is None
    assert found.bases.decode().shape == expected.bases.decode().shape
    one = torch.cat([each.X for each in problems(whole.without(expected))])
    other = torch.cat([each.X for each in problems(parts.without(found))])
    assert float(other.norm()) == pytest.approx(float(one.norm()), rel=0.02)
    assert float(other.norm()) < 0.8 * float(whole.read(slice(0, E)).norm())
