"""Rounding to grids in groups, against loops that know nothing of blocks, batches or orders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from globe.quant.feedback import order_inputs
from globe.quant.rounding import fit_scales, round_experts
from tests.random_experts import F64, normal, second_moment

E, N, K, SIZE = 3, 24, 5, 8


def moments(count: int) -> Tensor:
    sizes = torch.logspace(0, 1, N, dtype=F64)
    return torch.stack([second_moment(N, seed=seed) * sizes.outer(sizes) for seed in range(count)]).float()


def loss(X: Tensor, decoded: Tensor, C: Tensor) -> float:
    """Σ_e tr(Δᵀ C Δ)."""
    missed = (X - decoded).double()
    return float(torch.einsum("enk,enm,emk->", missed, C.double().expand(E, -1, -1), missed))


def textbook_gptq(X: Tensor, C: Tensor, bits: int) -> Tensor:
    """Inputs as they come, scales from the largest number of a group; a number at a time."""
    decoded, half = torch.empty_like(X), 2 ** (bits - 1)
    for e in range(E):
        now, c = X[e].double().clone(), C[e % len(C)].double()
        for i in range(N):
            left = torch.linalg.inv(c)[i:, i:] if i == 0 else torch.linalg.inv(c[i:, i:])
            scale = X[e].unflatten(0, (-1, SIZE))[i // SIZE].double().abs().amax(0) / (half - 0.5)
            q = (now[i] / scale).round().clamp(-half, half - 1) * scale
            now[i:] -= (left[:, 0] / left[0, 0])[:, None] * (now[i] - q)
            decoded[e, i] = q
    return decoded


@pytest.mark.parametrize("count", [1, E])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_loses_less_than_the_textbook(count: int, bits: int) -> None:
    X, C = normal(E, N, K, dtype=torch.float32), moments(count)
    rounded = round_experts(X, C, order_inputs(C, falling=True), bits, SIZE, torch.bfloat16)
    ours, theirs = loss(X, rounded.decode(), C), loss(X, textbook_gptq(X, C, bits), C)
    assert ours < 0.75 * theirs
    half = 2 ** (bits - 1)
    assert rounded.numbers.dtype == torch.int8
    assert -half <= int(rounded.numbers.min()) < int(rounded.numbers.max()) < half
    by_hand = torch.stack([rounded.scales[:, i // SIZE].float() * rounded.numbers[:, i] for i in range(N)], 1)
    assert torch.equal(rounded.decode(), by_hand)


def test_no_other_scales_lose_less_with_these_numbers() -> None:
    X, C = normal(E, N, K, dtype=torch.float32), moments(E)
    rounded = round_experts(X, C, order_inputs(C, falling=True), 4, SIZE, torch.float32)
    best = 0.0
    for e in range(E):
        root = torch.linalg.cholesky(C[e].double()).T
        for k in range(K):
            columns = torch.block_diag(*rounded.numbers[e, :, k].double().view(-1, SIZE, 1).unbind())
            wanted = root @ X[e, :, k].double()
            scales = torch.linalg.lstsq(root @ columns, wanted[:, None]).solution
            best += float((wanted[:, None] - root @ columns @ scales).square().sum())
    assert loss(X, rounded.decode(), C) == pytest.approx(best, rel=1e-3)


@given(st.integers(0, 10**6), st.sampled_from([4, 8]), st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=30, deadline=None)
def test_scales_cost_what_is_said_and_no_more_than_the_whole_range(seed: int, bits: int, size: float) -> None:
    X, prices = normal(2, 16, 3, seed=seed, dtype=torch.float32) * size, torch.rand(1, 16) + 0.1
    X[0, :8] = 0  # a group of nothing
    scales, costs = fit_scales(X, prices, bits, 8, torch.bfloat16)
    assert bool((scales != 0).all())
    half = 2 ** (bits - 1)

    def cost(of: Tensor) -> Tensor:
        wide = of.double().repeat_interleave(8, 1)
        missed = X.double() - (X.double() / wide).round().clamp(-half, half - 1) * wide
        return (missed.square() * prices[:, :, None]).sum(1)

    torch.testing.assert_close(costs.double(), cost(scales), rtol=1e-3, atol=1e-9 * size**2)
    groups = X.unflatten(1, (2, 8))
    whole = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2) / -half
    whole = torch.where(whole == 0, 1.0, whole).bfloat16()  # its largest number lies at the end of the grid
    assert bool((costs <= cost(whole) * 1.001 + 1e-9 * size**2).all())


def test_experts_of_zeros_stay_zeros() -> None:
    C = moments(1)
    rounded = round_experts(torch.zeros(E, N, K), C, order_inputs(C, falling=True), 4, SIZE, torch.float16)
    assert not rounded.decode().any()
    assert bool(rounded.scales.isfinite().all())
