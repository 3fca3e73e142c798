from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from globe.quant import coded as module
from globe.quant import packing, trellis
from globe.quant.coded import CodedExperts, Form, code_experts, rehearse, row_costs, shared_or_not
from globe.quant.feedback import Order, order_inputs
from globe.quant.outputs import Outputs, fit_outputs
from globe.quant.side import OwnRows, SharedCosts
from globe.quant.sizes import side_bytes
from globe.quant.water_fill import UNIT, Rows, water_fill, widths_at

E, N, K = 4, 32, 64
FORMS: list[Form] = ["own", "shared"]
ROTATED = Outputs()


def make(seed: int = 0, num_outputs: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """Experts (E, N, K), a second moment (1, N, N) and importances (E,), all of them uneven."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(E, N, num_outputs, generator=generator) * torch.logspace(0, -0.5, N)[:, None]
    half = torch.randn(N, N, generator=generator) * torch.logspace(0, -1, N)
    return X, (half @ half.mT / N + 0.02 * torch.eye(N))[None], torch.logspace(0, -1.5, E)


def total(costs: Tensor | SharedCosts) -> Tensor:
    return costs.total() if isinstance(costs, SharedCosts) else costs


def coded(
    X: Tensor, order: Order, importance: Tensor, bits: float, form: Form, outputs: Outputs = ROTATED
) -> tuple[CodedExperts, Tensor, int]:
    rows, length = outputs.apply(X), trellis.path_length(X.shape[2])
    budget = int(X.numel() * bits / 8) - side_bytes(E, N, form == "shared") - outputs.num_bytes
    mean_squares = rows.square().mean(2)
    for _ in range(2):
        costs = shared_or_not(row_costs(mean_squares, importance, order), form)
        multiplier = water_fill([Rows(total(costs), length)], budget).multiplier
        expected = rehearse(rows, order, widths_at(total(costs), multiplier))
        mean_squares = expected.mean_squares
    return *code_experts(X, outputs, order, costs, multiplier, expected), budget


def decode_rows(found: CodedExperts) -> Tensor:
    rows = found.rows()
    each = (x.flatten() for x in (rows.offsets, rows.widths, rows.steps))
    return packing.decode(found.payload, *each, found.length).view(E, N, -1)[..., : found.num_outputs]


def loss(X: Tensor, Y: Tensor, C: Tensor, importance: Tensor) -> float:
    def weighted(D: Tensor) -> Tensor:
        return importance @ torch.einsum("enk,nm,emk->e", D, C[0], D)

    return float(weighted(Y - X) / weighted(X))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_own_order", [False, True])
def test_threads_that_code_a_part_each_change_nothing(
    form: Form, has_own_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, C, importance = make()
    order = order_inputs(C + torch.linspace(0, 0.3, E)[:, None, None] * torch.eye(N) if has_own_order else C)
    outputs = fit_outputs(X.square().mean(1) * torch.logspace(0, -3, K), N, torch.ones(E, K))
    widths = torch.randint(2, 9, (E, N), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    expected = rehearse(outputs.apply(X), order, widths)
    costs = shared_or_not(row_costs(expected.mean_squares, importance, order), form)
    code = functools.partial(code_experts, X, outputs, order, costs, int(total(costs).median()) - 3 * UNIT, expected)
    (one, decoded), before = code(), torch.get_num_threads()
    monkeypatch.setattr(module, "_LEAST_PER_THREAD", 1)
    try:
        for num_threads in (2, 3, 9):
            torch.set_num_threads(num_threads)
            found, same = code()
            assert torch.equal(found.payload, one.payload)
            assert torch.equal(found.side.exponents(), one.side.exponents())
            assert torch.equal(same, decoded)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("num_outputs", [5, 12, 37, K])
def test_what_is_stored_decodes_to_what_was_chosen(form: Form, is_scaled: bool, num_outputs: int) -> None:
    X, C, importance = make(num_outputs=num_outputs)
    steps = torch.randint(-4, 5, (E, num_outputs), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    outputs = Outputs(steps if is_scaled else None)
    found, decoded, budget = coded(X, order_inputs(C), importance, 5.0, form, outputs)
    assert found.payload.dtype == torch.uint8
    assert len(found.payload) <= budget
    assert found.is_sound()
    assert found.num_bytes == len(found.payload) + side_bytes(E, N, form == "shared") + outputs.num_bytes
    torch.testing.assert_close(outputs.apply(decoded), decode_rows(found), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.decode(), decoded, rtol=0, atol=0)
    some = torch.tensor([2, 0, 2])
    torch.testing.assert_close(found.decode(some), decoded[some], rtol=0, atol=0)
    apart = [found[torch.tensor(who)] for who in ([1, 3], [0, 2])]
    assert all(part.is_sound() for part in apart)
    assert sum(len(part.payload) for part in apart) == len(found.payload)
    torch.testing.assert_close(torch.cat([part.decode() for part in apart]), decoded[[1, 3, 0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_without_numba_it_is_the_same(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    X, C, importance = make(num_outputs=16)
    fast, decoded, _ = coded(X, order_inputs(C), importance, 3.0, form)
    monkeypatch.setattr(trellis, "compiled", lambda: None)
    slow, again, _ = coded(X, order_inputs(C), importance, 3.0, form)
    torch.testing.assert_close(fast.payload, slow.payload, rtol=0, atol=0)
    torch.testing.assert_close(decoded, again, rtol=0, atol=0)
    torch.testing.assert_close(slow.decode(), decoded, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_every_ingredient_pays(form: Form) -> None:
    X, C, importance = make(num_outputs=256)
    order = order_inputs(C)
    _, decoded, _ = coded(X, order, importance, 3.0, form)
    found = loss(X, decoded, C, importance)
    even = order_inputs(torch.diag_embed(C.diagonal(dim1=1, dim2=2)))
    _, decoded, _ = coded(X, even, importance, 3.0, form)
    assert found < 0.8 * loss(X, decoded, C, importance)  # no feedback
    expected = rehearse(ROTATED.apply(X), order, torch.full((E, N), 6, dtype=torch.uint8))
    alike = torch.full((E, N), -2300, dtype=torch.int32)
    assert widths_at(alike, -3600).unique().tolist() == [6]
    _, decoded = code_experts(X, ROTATED, order, alike, -3600, expected)
    assert found < 0.5 * loss(X, decoded, C, importance)  # no water-filling


def test_the_rehearsal_says_what_comes() -> None:
    """Mean squares are those of the rows coded in earnest, also where inputs are alike and most get no bits."""
    X, C, importance = make(num_outputs=512)
    X = X + 3 * X[:, :1]  # rows that share a part
    order = order_inputs(C)
    costs = row_costs(X.square().mean(2), importance, order)  # the rotation leaves mean squares as they are
    widths = widths_at(costs, -900)
    assert 0.2 < float((widths == 0).float().mean()) < 0.9
    expected = rehearse(ROTATED.apply(X), order, widths)
    side = code_experts(X, ROTATED, order, costs, -900, expected)[0].side
    assert isinstance(side, OwnRows)
    off = (side.exponents() - expected.exponents)[widths > 0].float()
    assert float(off.abs().mean()) < 0.3


def test_experts_are_rehearsed_with_noise_of_their_own() -> None:
    """It averages out where they share widths."""
    X, C, _ = make()
    alike = X[:1].expand(E, -1, -1)
    found = rehearse(alike, order_inputs(C), torch.full((E, N), 4, dtype=torch.uint8)).mean_squares
    last = int(C[0].diagonal().argmax())
    assert len(found[:, last].unique()) == E


def test_zero_experts_take_no_bytes_and_decode_to_zero() -> None:
    X, C, importance = make()
    X[1] = 0
    order = order_inputs(C)
    found, decoded, _ = coded(X, order, importance, 3.0, "own")
    assert int(found.side.widths()[1].sum()) == 0
    assert bool((decoded[1] == 0).all())
    assert bool(decoded.isfinite().all())


def test_rows_with_outliers_lose_as_little_as_normal_ones() -> None:
    X, _, _ = make(num_outputs=256)
    X[torch.rand(X.shape, generator=torch.Generator().manual_seed(1)) < 0.004] *= 30
    order = order_inputs(torch.diag_embed(torch.linspace(1, 2, N))[None])
    expected = rehearse(ROTATED.apply(X), order, torch.full((E, N), 6, dtype=torch.uint8))
    _, decoded = code_experts(X, ROTATED, order, torch.full((E, N), -2300, dtype=torch.int32), -3600, expected)
    missed = float((decoded - X).square().sum() / X.square().sum())
    assert missed == pytest.approx(trellis.DISTORTION[6], rel=0.1)


def test_scales_lower_the_loss_by_what_theory_says() -> None:
    """Where outputs are of many sizes and worths, at equal widths."""
    X, _, _ = make(num_outputs=256)
    generator = torch.Generator().manual_seed(3)
    X = X * torch.randn(E, 1, 256, generator=generator).exp()
    weights = torch.randn(E, 256, generator=generator).exp()
    order = order_inputs(torch.eye(N)[None])
    scaled = fit_outputs(X.square().mean(1), X.shape[1], weights)
    assert scaled.exponents is not None
    losses: list[float] = []
    for outputs in (ROTATED, scaled):
        expected = rehearse(outputs.apply(X), order, torch.full((E, N), 6, dtype=torch.uint8))
        _, decoded = code_experts(X, outputs, order, torch.full((E, N), -2300, dtype=torch.int32), -3600, expected)
        losses.append(float(((decoded - X).double().square().sum(1) * weights).sum()))
    mean_squares, squares = X.double().square().mean(1), scaled.scales().double().square()
    without = (weights.mean(1) * mean_squares.mean(1)).sum()
    theory = ((weights / squares).mean(1) * (squares * mean_squares).mean(1)).sum() / without
    assert float(theory) < 0.5
    assert losses[1] / losses[0] == pytest.approx(float(theory), rel=0.1)
