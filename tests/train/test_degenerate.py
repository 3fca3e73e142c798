"""Experts that are healthy but odd: zeros, copies, units far from 1. Fits end, finite, and tell the truth."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from globe.bank.objective import InputMetric, Problem, relative_errors
from globe.errors import GlobeError
from globe.terms import CodeMap, WarmStartName
from globe.train.config import FitConfig
from globe.train.fit_banks import FAINT, fit_bank, lift_faint
from globe.train.result import FitResult
from globe.train.stream import ExpertParts, fit_parts
from tests.random_experts import normal, planted_alignment, second_moment

P, D = 4, 6
KINDS = ("zero", "first", "tiny", "huge", "denormal", "zero rows", "zero columns", "constant", "rank one", "plain")


def odd_experts(kinds: list[str], seed: int) -> Tensor:
    experts = normal(len(kinds), P, D, seed=seed, dtype=torch.float32)
    for expert, kind in zip(experts, kinds, strict=True):
        match kind:
            case "zero":
                expert.zero_()
            case "first":
                expert.copy_(experts[0])
            case "tiny" | "huge" | "denormal":
                expert.mul_({"tiny": 1e-30, "huge": 1e30, "denormal": 1e-42}[kind])
            case "zero rows":
                expert[1:3] = 0
            case "zero columns":
                expert[:, ::2] = 0
            case "constant":
                expert.fill_(0.25)
            case "rank one":
                expert.copy_(expert[:, :1] * expert[:1])
            case _:
                pass
    return experts


mixed = st.lists(st.sampled_from(KINDS), min_size=1, max_size=6)
alike = st.builds(lambda kind, count: [kind] * count, st.sampled_from(KINDS), st.integers(1, 5))
stacks = st.builds(odd_experts, mixed | alike, st.integers(0, 3))


def check(result: FitResult, experts: Tensor) -> None:
    """Everything is finite, the error never rises, and it is that of the factors."""
    factors = result.factors
    for factor in (factors.adapters, factors.codes, factors.bases):
        assert bool(factor.isfinite().all())
    json.dumps([dataclasses.asdict(result.stats), [vars(step) for step in result.steps]], allow_nan=False)
    assert result.history == sorted(result.history, reverse=True)
    assert 0 <= result.history[-1] <= 1 + 1e-6
    assert result.outcome == "zero" if bool((experts == 0).all()) else result.outcome != "non_finite"


@st.composite
def settings(draw: st.DrawFn, num_experts: int) -> FitConfig:
    solver = draw(st.sampled_from(["varpro", "am"]))
    codes, num_bases = draw(st.sampled_from(get_args(CodeMap))), draw(st.integers(1, num_experts))
    return FitConfig(
        rank=draw(st.integers(1, P)),
        num_bases=num_bases,
        activation=draw(st.sampled_from(["tanh", "identity", "silu"])),
        codes=codes,
        support=draw(st.none() | st.integers(1, num_bases)),
        solver=solver,
        warm_start=draw(st.sampled_from(get_args(WarmStartName))),
        align_steps=3,
        max_steps=4,
    )


@given(stacks, st.data(), st.booleans())
def test_any_of_them_can_be_fitted(experts: Tensor, data: st.DataObject, calibrated: bool) -> None:
    config = data.draw(settings(len(experts)))
    groups = tuple(None if expert % 3 == 2 else 0 for expert in range(len(experts)))
    metric = InputMetric(second_moment(D)[None], groups) if calibrated else None
    result = fit_bank(experts, config, metric=metric)
    check(result, experts)
    composed = result.factors.compose()
    assert not composed[(experts == 0).all((1, 2))].any()  # zeros are met exactly, whoever is beside them
    if not calibrated:
        missed = float((experts.double() - composed.double()).norm() / experts.double().norm().clamp_min(1e-300))
        has_few_digits = float(experts.abs().max()) < 1e-38
        assert missed == pytest.approx(result.history[-1], abs=0.1 if has_few_digits else 1e-3)


@given(stacks, st.integers(1, P), st.data())
def test_any_of_them_can_be_streamed(experts: Tensor, rank: int, data: st.DataObject) -> None:
    num_bases, size = data.draw(st.integers(1, len(experts))), data.draw(st.integers(1, len(experts)))
    pieces = [piece / (piece.double().square().mean().sqrt() or 1.0) for piece in experts.split(size)]
    parts = ExpertParts([len(piece) for piece in pieces], P, D, lambda index: Problem(pieces[index].float()))
    config = FitConfig(rank=rank, num_bases=num_bases, align_steps=2, max_steps=2)
    result = fit_parts(parts, config)
    assert bool(result.factors.codes.isfinite().all())
    assert bool(result.factors.bases.isfinite().all())
    json.dumps([dataclasses.asdict(result.stats), [vars(step) for step in result.steps]], allow_nan=False)
    assert all(0 <= error <= 1 + 1e-6 for error in result.history)
    assert (result.outcome == "zero") == bool((experts == 0).all())


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_the_fit_does_not_depend_on_the_units(scale: float) -> None:
    experts = normal(6, P, D, dtype=torch.float32)
    config = FitConfig(rank=3, num_bases=2, align_steps=3, max_steps=5)
    expected, found = fit_bank(experts, config), fit_bank(experts * scale, config)
    tolerance = 1e-2 if scale == 1e-42 else 1e-5  # a denormal number has few digits
    assert found.history[-1] == pytest.approx(expected.history[-1], rel=tolerance)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_what_is_not_finite_is_still_refused(poison: float, scale: float) -> None:
    experts = normal(4, P, D, dtype=torch.float32) * scale
    experts[1, 2, 3] = poison
    with pytest.raises(GlobeError, match="NaN or Inf"):
        fit_bank(experts, FitConfig(rank=2, num_bases=2))


def test_an_expert_that_is_nothing_beside_the_others_is_still_approximated():
    """Its features are lifted for the fit, and its adapters made smaller for that."""
    experts = planted_alignment(12, 6, 16, 6, 4).float()
    faint = experts * torch.ones(12).index_fill(0, torch.tensor([3]), 1e-9)[:, None, None]
    result = fit_bank(faint, FitConfig(rank=5, num_bases=4, max_steps=20))
    assert float(relative_errors(faint, result.factors.compose())[3]) < 0.9
    lifted, back = lift_faint(faint)
    torch.testing.assert_close(lifted * back, faint)
    assert float(lifted[3].norm()) == pytest.approx(FAINT * float(faint.flatten(1).norm(dim=1).square().mean().sqrt()))
    assert lift_faint(experts)[0] is experts
