"""Adapters: the exact least-squares left factor of every expert, given its mixed basis."""

from __future__ import annotations

from torch import Tensor

from globe.bank.linalg import solve_positive


def refit_adapters(
    weights: Tensor, features: Tensor, *, lambda_a: float = 1e-6, weighed: Tensor | None = None
) -> tuple[Tensor, int]:
    """Minimise ‖(W_e − A_e N_e) C^{1/2}‖² over A_e: A_e = W_e C N_eᵀ (N_e C N_eᵀ + λ_A I)⁻¹.

    `weights` W (E, P, D), `features` N = φ(T) (E, R, D), `weighed` N C (E, R, D), N itself when None (C the identity);
    λ_A is in units of the Gram matrix's mean diagonal. Returns A (E, P, R) and the number of experts whose Gram matrix
    had no Cholesky factor.
    """
    weighed = features if weighed is None else weighed
    solution, num_fallbacks = solve_positive(weighed @ features.mT, weighed @ weights.mT, lambda_a)
    return solution.mT, num_fallbacks
