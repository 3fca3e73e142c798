from __future__ import annotations

import pytest
import torch
from torch import Tensor

from globe.quant import feedback
from globe.quant.feedback import code_inputs, order_inputs
from tests.random_experts import F64, normal, second_moment

E, N, K = 3, 23, 5


def moments(count: int) -> Tensor:
    return torch.stack(
        [
            second_moment(N, seed=seed) * torch.logspace(0, 1, N, dtype=F64).outer(torch.logspace(0, 1, N, dtype=F64))
            for seed in range(count)
        ]
    )


def rounded(_: int, rows: Tensor) -> Tensor:
    return (rows * 2).round() / 2


@pytest.mark.parametrize("count", [1, E])
@pytest.mark.parametrize("falling", [False, True])
def test_order_is_the_cholesky_factor_of_the_inverse(count: int, falling: bool) -> None:
    C = moments(count)
    order = order_inputs(C, falling=falling)
    for c, inputs, shares, prices in zip(C, order.inputs, order.shares, order.prices, strict=True):
        sorted_ = c[inputs][:, inputs]
        assert bool((sorted_.diagonal().diff() * (-1 if falling else 1) >= 0).all())
        upper = torch.linalg.cholesky(torch.linalg.inv(sorted_), upper=True)
        torch.testing.assert_close(shares.double(), upper / upper.diagonal()[:, None], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(prices.double(), upper.diagonal() ** -2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [1, E])
@pytest.mark.parametrize(("block", "few"), [(1, 1), (4, 1), (4, 3), (23, 8), (64, 8), (64, 64)])
def test_blocked_equals_a_loop(count: int, block: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "BLOCK", block)
    monkeypatch.setattr(feedback, "_FEW", few)
    order = order_inputs(moments(count))
    X = order.sort(normal(E, N, K))
    shares = order.shares.double().expand(E, -1, -1)
    wanted = torch.empty_like(X)
    for e in range(E):
        now = X[e].clone()
        for i in range(N):
            wanted[e, i] = rounded(i, now[i])
            for j in range(i + 1, N):
                now[j] -= shares[e, i, j] * (now[i] - wanted[e, i])
    order64 = type(order)(order.inputs, order.shares.double(), order.prices.double())
    torch.testing.assert_close(code_inputs(X, order64, rounded), wanted, rtol=0, atol=0)


def test_the_error_costs_what_the_prices_say() -> None:
    """tr((X − Q)ᵀ C (X − Q)) = Σ_i d_i ‖error of row i when it was its turn‖²."""
    C = moments(E)
    order = order_inputs(C)
    X = normal(E, N, K)
    errors = torch.zeros(E, N, dtype=F64)

    def watched(i: int, rows: Tensor) -> Tensor:
        errors[:, i] = (rows - rounded(i, rows)).square().sum(1)
        return rounded(i, rows)

    order64 = type(order)(order.inputs, order.shares.double(), order.prices.double())
    missed = X - order.unsort(code_inputs(order.sort(X), order64, watched))
    cost = torch.einsum("enk,enm,emk->e", missed, C, missed)
    torch.testing.assert_close((order.prices.double() * errors).sum(1), cost, rtol=1e-4, atol=0)
    plain = X - rounded(0, X)
    assert float(cost.sum()) < float(torch.einsum("enk,enm,emk->", plain, C, plain))


def test_sorting_is_undone() -> None:
    for count in (1, E):
        order = order_inputs(moments(count))
        for x in (normal(E, N, K), normal(E, N)):
            torch.testing.assert_close(order.unsort(order.sort(x)), x, rtol=0, atol=0)
            torch.testing.assert_close(order.sort(x)[0], x[0, order.inputs[0]], rtol=0, atol=0)


def test_singular_moments_are_named() -> None:
    C = moments(3)
    C[1] = 0
    with pytest.raises(ValueError, match="second moments 1 of 3 are not positive definite"):
        order_inputs(C)
