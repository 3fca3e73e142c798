"""One step of alternating minimisation: codes → targets → bank → adapters → accept."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from globe.bank.activations import activate
from globe.bank.adapters import refit_adapters
from globe.bank.bases import gauss_newton_bases, normalize_atoms, optimal_directions
from globe.bank.codes import CODE_FLOOR, ridge_codes, simplex_codes
from globe.bank.factors import mix
from globe.bank.objective import Problem, features_objective
from globe.bank.targets import blend_targets, wanted_features, weight_aware_targets

BankUpdate = Literal["optimal_directions", "gauss_newton"]


@dataclasses.dataclass(frozen=True)
class AMStep:
    """The factors after a step, and what it measured on the way."""

    adapters: Tensor
    """A, (E, P, R)."""
    alpha: Tensor
    """Codes, (E, M): the state itself, never its logarithm."""
    bases: Tensor
    """B, (M, R, D)."""
    objective: float
    """f of the factors returned."""
    candidate_objective: float
    """f of the step that was tried; equal to `objective` when it was accepted."""
    accepted: bool
    """False: the step would have raised f, and the factors returned are those passed in."""
    num_fallbacks: int
    """Adapters that had no Cholesky factor."""


def am_step(
    problem: Problem,
    adapters: Tensor,
    alpha: Tensor,
    bases: Tensor,
    warm_targets: Tensor,
    *,
    activation: str,
    activation_lambda: float,
    route_beta: float,
    use_weight_aware_targets: bool,
    codes: str = "ridge",
    num_kept: int | None = None,
    temperature: float = 1.0,
    step_size: float = 1.0,
    bank_update: BankUpdate = "optimal_directions",
    lambda_b: float = 1e-4,
    lambda_t: float = 1e-6,
    epsilon: float = CODE_FLOOR,
) -> AMStep:
    """Update codes, bank and adapters once, and keep the result only if f does not rise.

    Targets are computed afresh from the present factors: Route-L fits S = (1−β) S_L + β S_W, where S_L is
    `warm_targets` (E, R, D); Route-W (`use_weight_aware_targets`) fits S_W alone. `step_size` in (0, 1] moves codes
    and bank part of the way, for backtracking. `bank_update` "gauss_newton" replaces the method of optimal
    directions, which minimises ‖S − T‖ and may raise f, by the update that minimises ‖W − Aφ(T)‖ to first order; it
    needs no targets and leaves the codes alone. A pure function: nothing is logged, scheduled or changed in place.

    Source: the method's seed documents; optimal directions after Engan, Aase and Husøy 1999.
    """
    weights, mixed = problem.weights, mix(alpha, bases)
    before = features_objective(problem, adapters, activate(mixed, activation, activation_lambda))

    if bank_update == "gauss_newton":
        new_alpha = alpha
        new_bases = gauss_newton_bases(
            weights, adapters, alpha, bases, activation, activation_lambda, weigh=problem.weigh
        )
    else:
        weight_aware = use_weight_aware_targets or route_beta > 0
        wanted = wanted_features(weights, adapters, lambda_t=lambda_t) if weight_aware else None

        def targets(now: Tensor) -> Tensor:
            if wanted is None:
                return warm_targets
            aware_targets = weight_aware_targets(wanted, now, activation, activation_lambda)
            return aware_targets if use_weight_aware_targets else blend_targets(warm_targets, aware_targets, route_beta)

        first = targets(mixed)
        if codes == "ridge":
            new_alpha = ridge_codes(first, bases, num_kept=num_kept)
        else:
            new_alpha = simplex_codes(alpha, first, bases, codes, temperature=temperature, epsilon=epsilon)
        linear = activation == "identity" or activation_lambda == 0
        second = first if linear or wanted is None else targets(mix(new_alpha, bases))
        new_bases, _ = optimal_directions(new_alpha, second, lambda_b=lambda_b)

    if step_size != 1.0:
        if num_kept is None:
            new_alpha = alpha.lerp(new_alpha, step_size)
        new_bases = bases.lerp(new_bases, step_size)
    if codes == "ridge":
        new_alpha, new_bases = normalize_atoms(new_alpha, new_bases)
    features = activate(mix(new_alpha, new_bases), activation, activation_lambda)
    new_adapters, num_fallbacks = refit_adapters(
        weights, features, lambda_a=problem.lambda_a, weighed=problem.weigh(features)
    )
    after = features_objective(problem, new_adapters, features)
    if after <= before:
        return AMStep(new_adapters, new_alpha, new_bases, after, after, True, num_fallbacks)
    return AMStep(adapters, alpha, bases, before, after, False, num_fallbacks)
