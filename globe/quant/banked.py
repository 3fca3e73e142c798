"""Experts that share something: a bank of coded bases, mixed by each expert's codes, and the rest coded by itself.

    X_e ≈ Σ_j a_ej B_j + R_e

The bases are the best for the experts in the metric of their inputs (the E x E Gram matrix has them), and are coded
first; what is left includes their error. A base need not be more precise than what is left is large: at its own price
of one bit an entry, a bit more is worth it while D > 1 / Σ_e a_ej² / ρ_e, with ρ_e the mean square of the rest (or of
what the multiplier would leave uncoded anyway). The bank is worth its bits where the rest costs so much less; experts
that share nothing get none.
"""

# `torch.linalg` has no type stubs
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from globe.quant.coded import CodedExperts, code_own, rehearse
from globe.quant.feedback import order_inputs
from globe.quant.outputs import Outputs
from globe.quant.packing import row_bytes
from globe.quant.sizes import side_bytes
from globe.quant.trellis import DISTORTION, path_length
from globe.quant.water_fill import UNIT, log_costs, widths_at

CODE_UNIT = 2.0**-12
"""What codes are stored in multiples of, int16."""
_LARGEST_CODE = 4.0
MOST_BASES = 8
"""Bases of a bank, at most; more are tried while they pay."""


@dataclasses.dataclass(frozen=True)
class CodedBank:
    """What experts share, as it is stored."""

    bases: CodedExperts
    """B (M, N, K)."""
    codes: Tensor
    """a (E, M) int16, in units of `CODE_UNIT`."""

    @property
    def num_bytes(self) -> int:
        """Stored, everything counted."""
        return self.bases.num_bytes + 2 * self.codes.numel()

    def add_to(self, rest: Tensor, experts: Tensor | None = None) -> Tensor:
        """Add the mixtures of the experts (n,), or of all, to the rest (n, N, K) in place: base after base, product and
        sum rounded each, so that every machine gets the same bits."""
        codes = self.codes if experts is None else self.codes[experts]
        for base, code in zip(self.bases.decode(), (codes * CODE_UNIT).unbind(1), strict=True):
            rest += code[:, None, None] * base
        return rest


@dataclasses.dataclass(frozen=True)
class BankedExperts:
    """Experts as they are stored: the rest, and the bank if they share anything."""

    rest: CodedExperts
    bank: CodedBank | None = None

    @property
    def num_bytes(self) -> int:
        """Stored, everything counted."""
        return self.rest.num_bytes + (0 if self.bank is None else self.bank.num_bytes)

    def __getitem__(self, experts: Tensor) -> BankedExperts:
        """Those with these indices (n,), with all of the bank's bases."""
        bank = None if self.bank is None else dataclasses.replace(self.bank, codes=self.bank.codes[experts])
        return BankedExperts(self.rest[experts], bank)

    def is_sound(self) -> bool:
        """Whether all parts fit each other."""
        return self.rest.is_sound() and (self.bank is None or self.bank.bases.is_sound())

    def decode(self, experts: Tensor | None = None) -> Tensor:
        """The experts with these indices (n,), or all: (n, N, K) float32; the same bits on every machine."""
        rest = self.rest.decode(experts)
        return rest if self.bank is None else self.bank.add_to(rest, experts)


def bits_and_loss(costs: Tensor, multiplier: int) -> Tensor:
    """What rows with log costs cost at best, per entry and in units of the multiplier: bits, and loss over it."""
    ratios = ((costs - multiplier).double() / UNIT).exp2()
    widths = widths_at(costs, multiplier).long()
    return widths / 2 + ratios * torch.tensor(DISTORTION, dtype=torch.float64, device=costs.device)[widths]


def share_bank(
    X: Tensor,
    second_moment: Tensor,
    prices: Tensor,
    importance: Tensor,
    multiplier: int,
    num_bases: int | None = None,
    mixed: Callable[[Tensor], Tensor] | None = None,
) -> CodedBank | None:
    """The bank that saves most at a log multiplier, coded; None where none pays.

    X (E, N, K), second_moment C (N, N) of all experts' inputs together, prices (1 or E, N) of these, importance (E,).
    1, 2, 4, … bases are tried as long as they save bits; or the bank has `num_bases`, which were found before. Where X
    has some of the outputs only, `mixed` gives Σ_e m_je X_e (M, N, all outputs) for m (M, E).
    """
    weights = importance.clamp_min(1e-6 * importance.mean()).double()
    if len(X) < 2 or num_bases == 0 or not bool((weights > 0).all()):
        return None
    roots = weights.sqrt()
    gram = ((second_moment @ X).flatten(1) @ X.flatten(1).mT).double() * roots[:, None] * roots
    vectors = cast(Tensor, torch.linalg.eigh(gram)[1]).flip(1)

    def row_costs(x: Tensor) -> Tensor:
        return log_costs(importance[:, None] * prices * x.square().mean(2))

    def fit(count: int) -> _Fitted:
        codes = vectors[:, :count] / roots[:, None]
        codes = (codes / codes.abs().amax(0) * (_LARGEST_CODE / CODE_UNIT)).round().to(torch.int16)
        bases = _mix(_mixing(codes, weights), X)
        return _Fitted(bases, codes, _widths(X, bases, codes, importance[:, None] * prices, multiplier))

    def whole(fitted: _Fitted) -> _Fitted:
        return fitted if mixed is None else dataclasses.replace(fitted, bases=mixed(_mixing(fitted.codes, weights)))

    def total(rest: Tensor) -> float:
        return float(bits_and_loss(row_costs(rest), multiplier).sum()) * X.shape[2]

    if num_bases is not None:
        return whole(fit(num_bases)).coded(second_moment)
    least, best, count = total(X), None, 1
    while count <= min(MOST_BASES, len(X) // 2):
        fitted = fit(count)
        if total(X - fitted.mixtures()) + 8 * fitted.num_bytes >= least:
            break  # it would not pay either if coding it lost nothing
        bank = fitted.coded(second_moment)
        found = total(X - bank.add_to(torch.zeros_like(X))) + 8 * bank.num_bytes
        if found >= least:
            break
        least, best, count = found, bank if mixed is None else whole(fitted).coded(second_moment), 2 * count
    return best


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """A bank before its bases are coded."""

    bases: Tensor
    """(M, N, K)."""
    codes: Tensor
    """(E, M) int16."""
    widths: Tensor
    """(M, N) uint8, of the bases' rows."""

    @property
    def num_bytes(self) -> int:
        """What the bank will take."""
        M, N, K = self.bases.shape
        payload = int(row_bytes(self.widths, path_length(K)).sum())
        return payload + side_bytes(M, N, is_shared=False) + 2 * self.codes.numel()

    def mixtures(self) -> Tensor:
        """(E, N, K), of the bases as they are."""
        return _mixtures(self.bases, self.codes)

    def coded(self, second_moment: Tensor) -> CodedBank:
        """With bases coded in the metric C (N, N)."""
        order, outputs = order_inputs(second_moment[None]), Outputs()
        expected = rehearse(outputs.apply(self.bases), order, self.widths)
        return CodedBank(code_own(self.bases, outputs, order, self.widths, expected)[0], self.codes)


def _mixing(codes: Tensor, weights: Tensor) -> Tensor:
    """m (M, E) of the bases B_j = Σ_e m_je X_e that minimise Σ_e w_e ‖X_e − Σ_j a_ej B_j‖²."""
    a = codes.double() * CODE_UNIT
    gram = a.mT @ (weights[:, None] * a)
    return cast(Tensor, torch.linalg.solve(gram, (weights[:, None] * a).mT)).float()


def _mix(mixing: Tensor, X: Tensor) -> Tensor:
    return torch.einsum("me,enk->mnk", mixing, X)


def _mixtures(bases: Tensor, codes: Tensor) -> Tensor:
    return torch.einsum("em,mnk->enk", codes.float() * CODE_UNIT, bases)


def _widths(X: Tensor, bases: Tensor, codes: Tensor, row_importance: Tensor, multiplier: int) -> Tensor:
    """Widths (M, N) uint8 with which bases are as precise as what they leave asks for."""
    rest = (X - _mixtures(bases, codes)).square().mean(2)
    uncoded = 2.0 ** (multiplier / UNIT) / row_importance.clamp_min(torch.finfo(rest.dtype).tiny)
    a = codes.float() * CODE_UNIT
    tolerated = 1 / (a.square().mT @ (1 / torch.maximum(rest, uncoded).clamp_min(torch.finfo(rest.dtype).tiny)))
    return widths_at(log_costs(bases.square().mean(2) / tolerated), 0)
