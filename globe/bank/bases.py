"""Bank updates: the method of optimal directions on targets, and the exact weighted one by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from globe.bank.activations import activate, jacobian
from globe.bank.factors import mix
from globe.bank.linalg import inner, norms, solve_positive

NORM_FLOOR = 1e-8


def optimal_directions(codes: Tensor, targets: Tensor, *, lambda_b: float = 1e-4) -> tuple[Tensor, int]:
    """Method of optimal directions (Engan 1999): B = (aᵀa + λ_B I)⁻¹ aᵀS, by a solve and never by an inverse.

    `codes` (E, M), `targets` S (E, R, D); λ_B in units of the mean diagonal of aᵀa. Returns B (M, R, D) and how many
    factorisations failed (0 or 1).
    """
    # solving for the M x E pseudoinverse first leaves one product with the R·D columns, instead of three
    pseudoinverse, failed = solve_positive(codes.mT @ codes, codes.mT, lambda_b)
    return (pseudoinverse @ targets.flatten(1)).view(-1, *targets.shape[1:]), failed


def gauss_newton_bases(
    weights: Tensor,
    adapters: Tensor,
    codes: Tensor,
    bases: Tensor,
    activation: str,
    activation_lambda: float = 1.0,
    *,
    weigh: Callable[[Tensor], Tensor] = lambda x: x,
    lambda_b: float = 1e-4,
    max_iterations: int = 20,
    tolerance: float = 1e-3,
) -> Tensor:
    """Minimise Σ_e ‖W_e − A_e (N_e + J_e ⊙ (a_e·ΔB))‖² over ΔB at fixed A and a; returns B + ΔB, (M, R, D).

    `weigh` multiplies (E, K, D) by the metric of the norm, x ↦ x_e C_e, the identity by default. For φ = identity
    this is the exact bank update Σ_e a_ej A_eᵀA_e (Σ_k a_ek B_k) = Σ_e a_ej A_eᵀ W_e, otherwise one Gauss–Newton step.
    Matrix-free conjugate gradients on ΔB, preconditioned by (aᵀa)⁻¹ ⊗ (mean AᵀA)⁻¹: the bank is the largest object that
    is ever built.
    """
    mixed = mix(codes, bases)
    slope = jacobian(mixed, activation, activation_lambda)
    gram = adapters.mT @ adapters
    codes_gram = codes.mT @ codes
    mean_gram = gram.mean(0)

    def adjoint(x_erd: Tensor) -> Tensor:
        return (codes.mT @ (slope * x_erd).flatten(1)).view_as(bases)

    def operator(delta: Tensor) -> Tensor:
        return adjoint(gram @ weigh(slope * mix(codes, delta)))

    def precondition(x_mrd: Tensor) -> Tensor:
        left = solve_positive(codes_gram, x_mrd.flatten(1), lambda_b)[0].view_as(x_mrd)
        return (
            solve_positive(mean_gram, left.movedim(1, 0).flatten(1), lambda_b)[0]
            .view(bases.shape[1], bases.shape[0], bases.shape[2])
            .movedim(0, 1)
        )

    missed = weights - adapters @ activate(mixed, activation, activation_lambda)
    residual = adjoint(adapters.mT @ weigh(missed))
    delta, direction = torch.zeros_like(bases), precondition(residual)
    power = first = inner(residual, direction).sum()
    for _ in range(max_iterations):
        image = operator(direction)
        curvature = inner(direction, image).sum()
        if not curvature > 0:
            break
        length = power / curvature
        delta += length * direction
        residual -= length * image
        preconditioned = precondition(residual)
        last, power = power, inner(residual, preconditioned).sum()
        if not power > tolerance**2 * first:
            break
        direction = preconditioned + (power / last) * direction
    return bases + delta


def normalize_atoms(codes: Tensor, bases: Tensor) -> tuple[Tensor, Tensor]:
    """Give every atom unit Frobenius norm, the codes taking up the scale, so that T_e does not change.

    Norms are held above a floor of 1e-8, so a dead atom is not blown up.
    """
    scale = norms(bases).clamp_min(NORM_FLOOR)
    return codes * scale, bases / scale[:, None, None]
