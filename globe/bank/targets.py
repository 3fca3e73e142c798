"""Targets of the dictionary update: what each expert's mixed basis T_e should be."""

from __future__ import annotations

from torch import Tensor

from globe.bank.activations import activate, jacobian
from globe.bank.linalg import solve_positive

JACOBIAN_FLOOR = 0.1


def wanted_features(weights: Tensor, adapters: Tensor, *, lambda_t: float = 1e-6) -> Tensor:
    """N* = (AᵀA + λ_T I)⁻¹ Aᵀ W: the features that reproduce W_e best under the present adapters.

    `weights` (E, P, D), `adapters` (E, P, R); returns (E, R, D). N* does not depend on the mixtures: one solve serves
    all targets of a step.
    """
    return solve_positive(adapters.mT @ adapters, adapters.mT @ weights, lambda_t)[0]


def weight_aware_targets(
    wanted: Tensor, mixed: Tensor, activation: str, activation_lambda: float, *, floor: float = JACOBIAN_FLOOR
) -> Tensor:
    """S_W = T + (N* − φ_λ(T)) / J: the mixed basis that gives the features N*, to first order.

    J is the blended Jacobian, held above `floor` in magnitude; at λ = 0 it is 1 and S_W = N*. `wanted` N* and `mixed` T
    are (E, R, D), as is the result.
    """
    if activation == "identity" or activation_lambda == 0.0:
        return wanted
    slope = jacobian(mixed, activation, activation_lambda)
    slope = slope.abs().clamp_min_(floor).copysign_(slope)
    features = activate(mixed, activation, activation_lambda)  # a tensor of its own: φ is not the identity here
    return features.neg_().add_(wanted).div_(slope).add_(mixed)


def blend_targets(warm: Tensor, weight_aware: Tensor, route_beta: float) -> Tensor:
    """S = (1−β) S_L + β S_W."""
    return warm.lerp(weight_aware, route_beta)
