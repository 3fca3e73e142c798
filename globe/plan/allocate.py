"""How much of the budget each bank deserves: error against size, weighted by what an error costs the model.

The divergence of the compressed model is close to a sum over the banks,

    KL ≈ Σ_b s_b err_b(k_b)^p,    Σ_b k_b (parameters of b) = keep · (parameters of all),

with s_b the sensitivity of the bank's experts and err_b its relative error when the share k_b of its parameters is
kept. The error of a short fit falls about exponentially in k, so two of them tell its level and slope; what a full fit
gains over it grows with k alike for all banks. For noise p would be 2; what compression leaves out is not noise, and p
was measured (docs/log.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from globe.bank_shape import BankShape
from globe.errors import SettingsError
from globe.plan.budget import Keep
from globe.plan.knapsack import choose
from globe.plan.scopes import Scope

ERROR_POWER = 3.0
"""p, measured."""
DAMPING = 0.8
"""Exponent of the sensitivities: second-order theory and random tokens overstate the largest."""
REACH = 0.5
"""How far a bank's share may be from the uniform one, over what is there to take or to add; as far as `ErrorCurve` was
measured to hold."""
STEP = 0.005
"""Between the shares that a bank is offered."""


@dataclasses.dataclass(frozen=True)
class ErrorCurve:
    """Relative error against the share k < 1 of the parameters that is kept, at most 1:

    level · exp(slope (share − k) − gain k / √(1 − k))
    """

    share: float
    """Where a short fit was made."""
    level: float
    """Its error."""
    slope: float
    """Fall of the logarithm of a short fit's error per unit of share."""
    gain: float = 0.0
    """Of a full fit over a short one."""

    def __call__(self, share: float) -> float:
        if self.level == 0:
            return 0.0
        short = math.log(self.level) + self.slope * (self.share - share)
        return math.exp(min(0.0, short) - self.gain * share / math.sqrt(1 - share))


def allocate(
    scopes: Sequence[Scope], curves: Sequence[ErrorCurve], sensitivities: Sequence[float], budget: Keep
) -> list[Scope]:
    """The scopes with the shapes that make Σ s_b err_b^p smallest and store no more than the `scopes` given do.

    `scopes` have the shapes of the uniform choice; `curves` and `sensitivities` follow their banks.
    """
    banks = [bank for scope in scopes for bank in scope.banks]
    menus = [_menu(bank.shape, budget.share) for bank in banks]
    weights = [sensitivity**DAMPING for sensitivity in sensitivities]
    if not any(weights):  # nothing tells the banks apart but their errors
        weights = [1.0] * len(weights)
    costs = [
        [weight * curve(option.share) ** ERROR_POWER for option in menu]
        for menu, curve, weight in zip(menus, curves, weights, strict=True)
    ]
    sizes = [[option.parameters for option in menu] for menu in menus]
    chosen = choose(costs, sizes, sum(bank.shape.parameters for bank in banks))
    resized = iter(
        dataclasses.replace(bank, shape=menu[j], predicted_error=curve(menu[j].share))
        for bank, menu, curve, j in zip(banks, menus, curves, chosen, strict=True)
    )
    return [dataclasses.replace(scope, banks=tuple(next(resized) for _ in scope.banks)) for scope in scopes]


def _menu(uniform: BankShape, keep: float) -> list[BankShape]:
    """Shapes of one bank around the uniform one, in ascending size."""
    num_steps = round(REACH * min(keep, 1 - keep) / STEP)
    options = {uniform.parameters: uniform}
    for number in range(-num_steps, num_steps + 1):
        try:
            option = Keep(keep + number * STEP).shape_for(uniform.matrices)
        except SettingsError:  # too little for a single basis
            continue
        options.setdefault(option.parameters, option)
    return [options[size] for size in sorted(options)]
