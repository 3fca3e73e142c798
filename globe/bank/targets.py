"""Targets of the dictionary update: what each expert's mixed basis T_e should be."""

from __future__ import annotations

from torch import Tensor

from globe.bank.activations import activate, jacobian
from globe.bank.linalg import solve_positive

JACOBIAN_FLOOR = 0.1


def weight_aware_targets(
    weights: Tensor,
    adapters: Tensor,
    mixed: Tensor,
    activation: str,
    activation_lambda: float,
    *,
    lambda_t: float = 1e-6,
    floor: float = JACOBIAN_FLOOR,
) -> Tensor:
    """S_W: the mixed basis that would reproduce W_e under the present adapters, to first order.

    The features wanted are N* = (AᵀA + λ_T I)⁻¹ Aᵀ W; through the nonlinearity S_W = T + (N* − φ(T)) / J with the
    blended Jacobian J, held above `floor` in magnitude. At λ = 0, J = 1 and S_W = N*.
    Shapes: `weights` (E, P, D), `adapters` (E, P, R), `mixed` T (E, R, D); returns (E, R, D).
    """
    wanted, _ = solve_positive(adapters.mT @ adapters, adapters.mT @ weights, lambda_t)
    if activation == "identity" or activation_lambda == 0.0:
        return wanted
    slope = jacobian(mixed, activation, activation_lambda)
    slope = slope.sign().where(slope != 0, 1.0) * slope.abs().clamp_min(floor)
    return mixed + (wanted - activate(mixed, activation, activation_lambda)) / slope


def blend_targets(warm: Tensor, weight_aware: Tensor, route_beta: float) -> Tensor:
    """S = (1−β) S_L + β S_W."""
    return warm.lerp(weight_aware, route_beta)
