from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from globe.bank import objective
from globe.bank.factors import Factors
from globe.bank.objective import InputMetric
from globe.errors import SettingsError
from globe.experts.metric import LayerStatistics
from globe.experts.stack import ExpertStack, Group, read_stack
from globe.experts.storage import StoredFactors, to_storage
from globe.terms import Family
from tests.experts.conftest import Source, plan
from tests.model.compressed import D, E, P
from tests.random_experts import normal, second_moment

R, M = 5, 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PHI = {"identity": lambda t: t, "tanh": torch.tanh, "silu": torch.nn.functional.silu}


def random_factors(num_matrices: int, activation: str = "tanh", dtype: torch.dtype = torch.float32) -> Factors:
    """Codes and bases that float32 holds; the adapters of a fit are not read."""
    codes, bases = normal(num_matrices, M).float(), normal(M, R, D, seed=1).float()
    return Factors(torch.empty(0), codes.to(dtype), bases.to(dtype), activation)


def features(stored: StoredFactors, key: tuple[int, Family], expert: int, activation: str) -> Tensor:
    """φ(Σ_j a_ej B_j) from the stored tensors, in float64."""
    codes, bases = stored.codes[key][expert].double(), stored.bases.double()
    return PHI[activation](sum(codes[j] * bases[j] for j in range(M)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("source", ["per_expert"], indirect=True)
def test_the_errors_are_those_of_the_tensors_as_stored(
    source: Source, statistics: Mapping[int, LayerStatistics], calibrated: bool, activation: str, dtype: torch.dtype
) -> None:
    """In plain Frobenius norms of the weights in the files, whatever the metric of the fit."""
    stack = read_stack(source.checkpoint, source.layers, plan((0, 2)), statistics if calibrated else None)
    stored = to_storage(stack, random_factors(len(stack.weights), activation), dtype)
    assert stored.bases.dtype == dtype
    assert set(stored.errors) == {(group.layer, group.family) for group in stack.groups}
    for key in stored.errors:
        assert (stored.adapters[key].shape, stored.codes[key].shape) == ((E, P, R), (E, M))
        assert (stored.adapters[key].dtype, stored.codes[key].dtype) == (dtype, dtype)
        missed, sizes = [], []
        for expert in range(E):
            weight = source.matrix(*key, expert)
            what = stored.adapters[key][expert].double() @ features(stored, key, expert, activation)
            missed.append(float((weight - what).square().sum()))
            sizes.append(float(weight.square().sum()))
        expected = [math.sqrt(one / size) for one, size in zip(missed, sizes, strict=True)]
        assert stored.expert_errors[key] == pytest.approx(expected, rel=1e-4)
        assert stored.errors[key] == pytest.approx(math.sqrt(sum(missed) / sum(sizes)), rel=1e-4)
        assert 0 < stored.errors[key] < 1


def random_stack(num_experts: int = E, *, metric: bool = False) -> ExpertStack:
    """Two groups in different units, the second one's rows scaled."""
    scales = normal(num_experts, P, seed=5).abs() + 0.3
    groups = (
        Group(0, "gate", slice(0, num_experts), 0.3),
        Group(0, "down", slice(num_experts, 2 * num_experts), 4.0, scales if metric else None),
    )
    moments = InputMetric(second_moment(D)[None], (0,) * num_experts + (None,) * num_experts)
    return ExpertStack(normal(2 * num_experts, P, D, seed=9), groups, moments if metric else None)


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapters_are_least_squares_to_the_rounded_factors(dtype: torch.dtype, metric: bool) -> None:
    """Against lstsq of every expert, in its metric, on the features of what was stored; then rounded themselves."""
    stack = random_stack(metric=metric)
    stored = to_storage(stack, random_factors(2 * E, dtype=torch.float64), dtype, lambda_a=0.0)
    for group in stack.groups:
        key = (group.layer, group.family)
        root = torch.eye(D, dtype=torch.float64)
        if metric and group.family == "gate":
            root = torch.linalg.cholesky(second_moment(D))
        for expert, weight in enumerate(stack.weights[group.part]):
            n = features(stored, key, expert, "tanh")
            best = torch.linalg.lstsq((n @ root).mT, (weight @ root).mT).solution.mT * group.sigma
            if group.row_scales is not None:
                best = best / group.row_scales[expert][:, None]
            torch.testing.assert_close(stored.adapters[key][expert], best.to(dtype), rtol=2e-2, atol=1e-9)
            if dtype == torch.float64:
                torch.testing.assert_close(stored.adapters[key][expert], best)


def test_a_ridge_keeps_the_adapters_small() -> None:
    """λ_A in units of the mean diagonal of each Gram matrix: the formula, expert by expert."""
    stack, factors = random_stack(), random_factors(2 * E, dtype=torch.float64)
    stored = to_storage(stack, factors, torch.float64, lambda_a=0.3)
    for group in stack.groups:
        key = (group.layer, group.family)
        for expert, weight in enumerate(stack.weights[group.part]):
            n = features(stored, key, expert, "tanh")
            gram = n @ n.mT
            ridged = gram + 0.3 * gram.trace() / R * torch.eye(R)
            torch.testing.assert_close(stored.adapters[key][expert], group.sigma * weight @ n.mT @ ridged.inverse())


def test_each_group_has_its_own_codes_in_memory_of_their_own() -> None:
    stored = to_storage(random_stack(), factors := random_factors(2 * E, dtype=torch.float64), torch.float64)
    assert torch.equal(stored.codes[0, "gate"], factors.codes[:E])
    assert torch.equal(stored.codes[0, "down"], factors.codes[E:])
    pointers = {codes.untyped_storage().data_ptr() for codes in stored.codes.values()}
    assert len(pointers | {factors.codes.untyped_storage().data_ptr()}) == 3


@pytest.mark.parametrize("metric", [False, True])
def test_chunks_change_nothing(metric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, factors = random_stack(7, metric=metric), random_factors(14, dtype=torch.float64)
    whole = to_storage(stack, factors, torch.float64)
    monkeypatch.setattr(objective, "CHUNK_BYTES", 1)
    parts = to_storage(stack, factors, torch.float64)
    for key in whole.errors:
        torch.testing.assert_close(parts.adapters[key], whole.adapters[key])
        assert parts.errors[key] == pytest.approx(whole.errors[key], rel=1e-12)
        assert parts.expert_errors[key] == pytest.approx(whole.expert_errors[key], rel=1e-12)


def test_zeros_are_met_exactly_and_do_not_count() -> None:
    stack = random_stack()
    stack.weights[2] = 0
    stack.weights[E:] = 0
    groups = stack.groups[0], dataclasses.replace(stack.groups[1], sigma=0.0)
    factors = random_factors(2 * E, dtype=torch.float64)
    stored = to_storage(dataclasses.replace(stack, groups=groups), factors, torch.float32)
    assert not stored.adapters[0, "gate"][2].any()
    assert stored.expert_errors[0, "gate"][2] == 0
    assert stored.errors[0, "gate"] > 0
    assert not stored.adapters[0, "down"].any()
    assert stored.errors[0, "down"] == 0
    assert stored.expert_errors[0, "down"] == [0.0] * E


def test_adapters_that_leave_the_range_of_the_dtype_are_refused() -> None:
    stack = random_stack()
    groups = stack.groups[0], dataclasses.replace(stack.groups[1], sigma=1e6)
    far = dataclasses.replace(stack, groups=groups)
    factors = random_factors(2 * E, dtype=torch.float64)
    with pytest.raises(SettingsError, match="the adapters of layer 0 down leave the range of float16: choose"):
        to_storage(far, factors, torch.float16)
    assert math.isfinite(to_storage(far, factors, torch.bfloat16).errors[0, "down"])
