"""One step of alternating minimisation as it was before it was batched: the yardstick of the speed claims.

The same arithmetic as `globe.init.init_bank.am_step`, with an explicit inverse for bank and codes, a pseudoinverse for
every adapter and target, and a Python loop over the experts; nothing is accepted or rejected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from globe.bank.activations import activate, jacobian
from globe.bank.bases import normalize_atoms
from globe.bank.targets import JACOBIAN_FLOOR


def invert(gram: Tensor, ridge: float) -> Tensor:
    """(G + ridge·mean(diag G)·I)⁻¹ of (N, N), written out."""
    return torch.linalg.inv(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)))


def directions_by_inverse(codes: Tensor, targets: Tensor, lambda_b: float = 1e-4) -> Tensor:
    """The method of optimal directions with an inverse: codes (E, M), targets (E, R, D) -> B (M, R, D)."""
    flat = targets.flatten(1).mT @ codes @ invert(codes.mT @ codes, lambda_b)
    return flat.mT.unflatten(1, targets.shape[1:])


def adapters_by_pinv(weights: Tensor, features: Tensor) -> Tensor:
    """A_e = W_e N_e⁺, one expert after the other: (E, P, D), (E, R, D) -> (E, P, R)."""
    return torch.stack([w @ torch.linalg.pinv(n) for w, n in zip(weights, features, strict=True)])


def naive_step(
    weights: Tensor, adapters: Tensor, codes: Tensor, bases: Tensor, activation: str, activation_lambda: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, bank and adapters once, on weight-aware targets; returns A, a and B."""
    wanted = [torch.linalg.pinv(a) @ w for w, a in zip(weights, adapters, strict=True)]

    def targets(now: Tensor) -> Tensor:
        experts = zip(wanted, now, strict=True)
        return torch.stack([_target(n, _mixed(code, bases), activation, activation_lambda) for n, code in experts])

    flat = bases.flatten(1)
    solver = invert(flat @ flat.mT, 1e-6)
    codes = torch.stack([solver @ (flat @ target.flatten()) for target in targets(codes)])
    bases = directions_by_inverse(codes, targets(codes))
    codes, bases = normalize_atoms(codes, bases)
    features = [activate(_mixed(code, bases), activation, activation_lambda) for code in codes]
    return adapters_by_pinv(weights, torch.stack(features)), codes, bases


def _mixed(code: Tensor, bases: Tensor) -> Tensor:
    return (code @ bases.flatten(1)).view(bases.shape[1:])


def _target(wanted: Tensor, mixed: Tensor, activation: str, activation_lambda: float) -> Tensor:
    slope = jacobian(mixed, activation, activation_lambda)
    slope = slope.sign().where(slope != 0, 1.0) * slope.abs().clamp_min(JACOBIAN_FLOOR)
    return mixed + (wanted - activate(mixed, activation, activation_lambda)) / slope
