"""What experts share, against loops over all choices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from globe.quant import banked, trellis
from globe.quant.banked import CODE_UNIT, BankedExperts, CodedBank, _Fitted, bits_and_loss, share_bank
from globe.quant.coded import code_own, rehearse, row_costs
from globe.quant.feedback import Order, order_inputs
from globe.quant.outputs import Outputs
from globe.quant.side import OwnRows
from globe.quant.sizes import side_bytes
from globe.quant.water_fill import UNIT, widths_at
from tests.random_experts import F64, normal, second_moment

E, N, K = 6, 24, 48
MULTIPLIER = -6 * UNIT
"""About three bits for rows of mean square 1."""


def problem(num_shared: int, seed: int = 0) -> tuple[Tensor, Tensor, Order, Tensor]:
    """Experts (E, N, K) that are mixtures of so many and a little of their own, C, order and importance."""
    mixed = torch.einsum("em,mnk->enk", normal(E, num_shared, seed=seed), normal(num_shared, N, K, seed=seed + 1))
    X = (mixed + (0.05 if num_shared else 1.0) * normal(E, N, K, seed=seed + 2)).float()
    C = (second_moment(N, seed=seed) + torch.eye(N, dtype=F64)).float()
    return X, C, order_inputs(C[None]), normal(E, seed=seed + 3).exp().float()


def test_bits_and_loss_are_the_least_of_all_widths() -> None:
    costs = torch.arange(-3000, 3000, 37, dtype=torch.int32)
    widths = (0, *range(trellis.LEAST_WIDTH, trellis.MAX_WIDTH + 1))
    for cost, found in zip(costs.tolist(), bits_and_loss(costs, -500).tolist(), strict=True):
        each = [w / 2 + 2.0 ** ((cost + 500) / UNIT) * trellis.DISTORTION[w] for w in widths]
        assert found == pytest.approx(min(each), rel=1e-3)


def coded_bank(num_bases: int = 3) -> CodedBank:
    X, _, order, importance = problem(0, seed=4)
    bases = X[:num_bases]
    widths = widths_at(row_costs(bases.square().mean(2), importance[:num_bases], order), MULTIPLIER)
    outputs = Outputs()
    coded, _ = code_own(bases, outputs, order, widths, rehearse(outputs.apply(bases), order, widths))
    codes = torch.randint(-9000, 9000, (E, num_bases), generator=torch.Generator().manual_seed(2))
    return CodedBank(coded, codes.to(torch.int16))


def test_mixtures_are_added_base_after_base() -> None:
    bank, rest = coded_bank(), normal(E, N, K, seed=9).float()
    bases, wanted = bank.bases.decode(), rest.clone()
    for expert in range(E):
        for base in range(3):
            product = torch.tensor(int(bank.codes[expert, base]) * CODE_UNIT) * bases[base]
            wanted[expert] = wanted[expert] + product
    some = torch.tensor([4, 0, 4])
    assert torch.equal(bank.add_to(rest[some], some), wanted[some])
    assert torch.equal(bank.add_to(rest), wanted)


def test_all_parts_are_counted_and_looked_at() -> None:
    bank = coded_bank()
    assert bank.num_bytes == len(bank.bases.payload) + side_bytes(3, N, is_shared=False) + 2 * 3 * E
    rest = coded_bank(E).bases
    experts = BankedExperts(rest, bank)
    assert experts.num_bytes == rest.num_bytes + bank.num_bytes
    assert experts.is_sound()
    assert torch.equal(experts.decode(), bank.add_to(rest.decode()))
    some = torch.tensor([4, 1])
    assert torch.equal(experts[some].decode(), experts.decode()[some])
    assert len(experts[some].rest.payload) < len(rest.payload)
    assert isinstance(bank.bases.side, OwnRows)
    bank.bases.side.packed_widths[0, 0] ^= 1
    assert not experts.is_sound()


@pytest.mark.parametrize("num_shared", [1, 2])
def test_what_is_shared_is_found(num_shared: int) -> None:
    X, C, order, importance = problem(num_shared)
    bank = share_bank(X, C, order.prices_by_input(), importance, MULTIPLIER)
    assert bank is not None
    assert bank.codes.shape == (E, num_shared)
    assert bank.bases.is_sound()
    left = X - bank.add_to(torch.zeros_like(X))
    assert float(left.norm() / X.norm()) < 0.1
    whole, rest = (bits_and_loss(row_costs(x.square().mean(2), importance, order), MULTIPLIER) for x in (X, left))
    assert float(rest.sum()) * K + 8 * bank.num_bytes < 0.7 * float(whole.sum()) * K
    again = share_bank(X, C, order.prices_by_input(), importance, MULTIPLIER, num_shared)
    assert again is not None
    assert torch.equal(again.bases.payload, bank.bases.payload)
    assert torch.equal(again.codes, bank.codes)


def test_a_bank_takes_what_was_foreseen() -> None:
    """Odd numbers of inputs and outputs, and rows that are left out."""
    widths = torch.tensor([[0, 3, 5], [16, 2, 0]], dtype=torch.uint8)
    fitted = _Fitted(normal(2, 3, 17, seed=1).float(), torch.ones(E, 2, dtype=torch.int16), widths)
    assert fitted.num_bytes == fitted.coded(torch.eye(3)).num_bytes


def test_experts_that_share_nothing_have_no_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    X, C, order, importance = problem(0)
    with monkeypatch.context() as patch:
        patch.setattr(banked, "code_own", None)  # bases that cannot pay are not coded
        assert share_bank(X, C, order.prices_by_input(), importance, MULTIPLIER) is None
    X, C, order, importance = problem(1)
    assert share_bank(X, C, order.prices_by_input(), importance, MULTIPLIER, 0) is None
    assert share_bank(X[:1], C, order.prices_by_input(), importance[:1], MULTIPLIER) is None
    assert share_bank(X, C, order.prices_by_input(), 0 * importance, MULTIPLIER) is None


def test_bases_are_no_more_precise_than_what_is_left_asks_for() -> None:
    """Half the amplitude left is a bit more of each base, and what is not coded anyway needs none."""
    widths: list[float] = []
    for own in (0.2, 0.1, 0.05):
        X, C, order, importance = problem(1)
        mixture = normal(E, 1, 1, seed=5) * normal(1, N, K, seed=6)
        X = (mixture + own * normal(E, N, K, seed=7)).float()
        bank = share_bank(X, C, order.prices_by_input(), importance, -40 * UNIT, 1)
        assert bank is not None
        widths.append(float(bank.bases.side.widths().double().mean()))
    assert widths[1] - widths[0] == pytest.approx(2, abs=0.3)
    assert widths[2] - widths[1] == pytest.approx(2, abs=0.3)
    X, C, order, importance = problem(1)
    coarse = share_bank(X, C, order.prices_by_input(), importance, 40 * UNIT, 1)
    assert coarse is not None
    assert not bool(coarse.bases.side.widths().any())
