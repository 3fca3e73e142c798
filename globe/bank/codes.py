"""Codes: each expert's mixture of the bases, signed or on the simplex, and what is said about them.

The state between steps is the code itself, never its logarithm: entmax and sparsemax are not injective, so a stored
logit drifts. Each simplex map used here has a right inverse on the simplex (`simplex_preimage`), which is all that a
mirror-descent step needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import entmax  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import Tensor

from globe.bank.linalg import eigh, norms, solve_positive
from globe.errors import SettingsError
from globe.terms import CodeMap

CODE_FLOOR = 1e-3
"""ε: codes on the simplex below it are pruned."""

_SIMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "entmax15": lambda z: entmax.entmax15(z, dim=-1),  # pyright: ignore
    "sparsemax": lambda z: entmax.sparsemax(z, dim=-1),  # pyright: ignore
    "softmax": lambda z: torch.softmax(z, dim=-1),
}


def check_codes(name: str) -> None:
    """Raise `SettingsError` unless `name` is a known kind of code."""
    if name not in get_args(CodeMap):
        raise SettingsError(f"codes {name!r} are unknown; choose one of {', '.join(get_args(CodeMap))}")


def on_simplex(z: Tensor, codes: str) -> Tensor:
    """Map scores (E, M) to the simplex: softmax, sparsemax (Martins and Astudillo 2016) or 1.5-entmax (Peters 2019)."""
    return _SIMPLEX[codes](z)


def simplex_preimage(alpha: Tensor, codes: str) -> Tensor:
    """Scores z with on_simplex(z) = alpha: log α for softmax, α for sparsemax, 2√α for 1.5-entmax."""
    if codes == "softmax":
        return alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log()
    return alpha if codes == "sparsemax" else 2 * alpha.clamp_min(0).sqrt()


def ridge_codes(targets: Tensor, bases: Tensor, lambda_: float = 1e-6, num_kept: int | None = None) -> Tensor:
    """Signed least squares a_e = argmin ‖S_e − Σ_j a_ej B_j‖² + λ‖a_e‖², optionally with `num_kept` non-zeros.

    `targets` S (E, R, D), `bases` B (M, R, D); λ in units of the atoms' mean squared norm. With `num_kept` the largest
    entries of the dense solution (in units of their atoms' norms) are kept and solved for again. Returns (E, M).
    """
    s, b = targets.flatten(1), bases.flatten(1)
    gram, cross = b @ b.mT, b @ s.mT
    codes = solve_positive(gram, cross, lambda_)[0].mT
    if num_kept is None or num_kept >= codes.shape[1]:
        return codes
    return _restricted(gram, cross.mT, top_mask(codes * norms(b), num_kept), lambda_)


def pursue_codes(codes: Tensor, targets: Tensor, bases: Tensor, num_kept: int, lambda_: float = 1e-6) -> Tensor:
    """Codes with `num_kept` non-zeros for ‖S_e − Σ_j a_ej B_j‖², by hard-thresholding pursuit (Foucart 2011).

    From `codes` (E, M), ten gradient steps of length 1/L in units of the atoms' norms, each cut to the `num_kept`
    largest entries (iterative hard thresholding, Blumensath and Davies 2009), then the least squares on the support
    found. `targets` S (E, R, D), `bases` B (M, R, D). Returns (E, M).
    """
    s, b = targets.flatten(1), bases.flatten(1)
    size = norms(b).clamp_min(torch.finfo(b.dtype).tiny)
    gram, cross = b @ b.mT, s @ b.mT
    unit_gram, unit_cross, scaled = gram / size / size[:, None], cross / size, codes * size
    length = 1 / eigh(unit_gram)[0][-1]
    mask = top_mask(scaled, num_kept)
    for _ in range(10):
        scaled = scaled + length * (unit_cross - scaled @ unit_gram)
        mask = top_mask(scaled, num_kept)
        scaled = scaled * mask
    return _restricted(gram, cross, mask, lambda_)


def _restricted(gram: Tensor, cross: Tensor, mask: Tensor, lambda_: float) -> Tensor:
    """Least-squares codes (E, M) that are zero outside `mask`, whose rows hold equally many."""
    kept = mask.nonzero()[:, 1].view(mask.shape[0], -1)
    gram_ekk = gram[kept[:, :, None], kept[:, None, :]]
    solution = solve_positive(gram_ekk, cross.gather(1, kept)[:, :, None], lambda_)[0][..., 0]
    return torch.zeros_like(cross).scatter(1, kept, solution)


def top_mask(codes: Tensor, num_kept: int) -> Tensor:
    """True at the `num_kept` largest magnitudes of each row."""
    top = codes.abs().topk(min(num_kept, codes.shape[1]), dim=1).indices
    return torch.zeros_like(codes, dtype=torch.bool).scatter_(1, top, True)


def simplex_codes(
    alpha: Tensor, targets: Tensor, bases: Tensor, codes: str, *, temperature: float = 1.0, epsilon: float = CODE_FLOOR
) -> Tensor:
    """Mirror descent on ‖S_e − Σ_j α_ej B_j‖² over the simplex, then temperature, ε-prune and renormalisation.

    For sparsemax this is projected gradient descent, for softmax exponentiated gradient, for entmax15 the mirror map
    of its Tsallis entropy. Ten steps of length 1/L, L the largest eigenvalue of BBᵀ. The temperature divides the scores
    of the last one, which is α^(1/T) renormalised for softmax, and is not stored; α^(1/T) cannot widen the support of
    the other two, scores can. `alpha` (E, M) in and out.
    """
    s, b = targets.flatten(1), bases.flatten(1)
    gram, cross = b @ b.mT, s @ b.mT
    bound = gram.square().sum().sqrt()  # the Frobenius norm is at least the largest eigenvalue
    length = 1 / bound.clamp_min(torch.finfo(gram.dtype).tiny)
    for step in range(10):
        z = simplex_preimage(alpha, codes) - length * (alpha @ gram - cross)
        alpha = on_simplex(z / temperature if step == 9 else z, codes)
    return prune(alpha, epsilon)


def prune(alpha: Tensor, epsilon: float) -> Tensor:
    """Zero the entries below ε, keep the largest of each row, renormalise to sum 1."""
    largest = alpha.amax(-1, keepdim=True)
    kept = torch.where((alpha >= epsilon) | (alpha == largest), alpha, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def support(codes: Tensor) -> Tensor:
    """Number of non-zero codes of each expert, (E,)."""
    return (codes != 0).sum(-1)


def spread_codes(alpha: Tensor, num_kept: int) -> Tensor:
    """Codes on the simplex with exactly `num_kept` non-zeros: each expert's largest, every atom lent a tenth first."""
    lent = 0.9 * alpha + 0.1 / alpha.shape[1]
    kept = lent * top_mask(lent, num_kept)
    return kept / kept.sum(-1, keepdim=True)


def entropy(codes: Tensor) -> Tensor:
    """−Σ_j p log p over p = |a| / Σ|a|, in nats, (E,); zeros contribute nothing."""
    p = codes.abs()
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return -torch.where(p > 0, p * p.log(), 0.0).sum(-1)


def popularity(codes: Tensor) -> Tensor:
    """Share of each basis in the experts' mixtures, mean over e of |a_ej| / Σ_k |a_ek|; (M,), sums to 1.

    An expert without codes does not count.
    """
    tiny = torch.finfo(codes.dtype).tiny
    shares = codes.abs() / codes.abs().sum(-1, keepdim=True).clamp_min(tiny)
    return shares.sum(0) / shares.sum().clamp_min(tiny)


def update_temperature(
    temperature: float, median_support: float, target: int, *, rate: float, lowest: float, highest: float
) -> float:
    """Steer the median support towards `target`: T ← clamp(T·exp(−η(support/target − 1)), T_min, T_max).

    A higher temperature flattens the codes and widens their support, so the exponent is negative.
    """
    return min(max(temperature * math.exp(-rate * (median_support / target - 1)), lowest), highest)
