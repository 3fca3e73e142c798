"""How much of the budget each bank deserves: error against size, weighted by what an error costs the model.

The divergence of the compressed model is close to a sum over the banks,

    KL ≈ Σ_b s_b err_b(k_b)^p,    Σ_b k_b (parameters of b) = keep · (parameters of all),

with s_b the sensitivity of the bank's experts and err_b its relative error when the share k_b of its parameters is
kept. err falls about exponentially in k, so two short fits tell its level and slope. For noise p would be 2; what
compression leaves out is not noise, and p was measured (docs/log.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint
from globe.config import CompressConfig
from globe.errors import SettingsError
from globe.experts import read_stack
from globe.knapsack import choose
from globe.loading import load
from globe.memory import FITS_EXHAUSTED, explained_exhaustion
from globe.plan import BankPlan, Scope, choose_shape, lowest_keep
from globe.runnable import Place, find_place
from globe.sensitivity import NUM_WINDOWS, measure_sensitivities, random_windows
from globe.train.fit_banks import fit_bank

ERROR_POWER = 3.0
"""p, measured."""
DAMPING = 0.8
"""Exponent of the sensitivities: second-order theory and random tokens overstate the largest."""
REACH = 0.75
"""How far a bank's share may be from the uniform one, over what is there to take or to add."""
STEP = 0.005
"""Between the shares that a bank is offered."""
SHORT_STEPS, SHORT_ALIGNMENTS = 20, 8
"""Of the fits that tell error against size."""
FULL_EXPONENT, FULL_FACTOR = 1.4, 1.15
"""A fit with the default settings ends at about this multiple of this power of the short fit's error."""
SMALLER = 0.8
"""Size of the second fit over that of the first."""


@dataclasses.dataclass(frozen=True)
class ErrorCurve:
    """Relative error against the share of the parameters that is kept."""

    share: float
    """Where it was measured."""
    level: float
    """Error there."""
    slope: float
    """Fall of its logarithm per unit of share."""

    def __call__(self, share: float) -> float:
        if self.level == 0:
            return 0.0
        return math.exp(min(0.0, math.log(self.level) + self.slope * (self.share - share)))


def allocate(
    scopes: Sequence[Scope], curves: Sequence[ErrorCurve], sensitivities: Sequence[float], keep: float
) -> list[Scope]:
    """The scopes with the shapes that make Σ s_b err_b^p smallest and store no more than the `scopes` given do.

    `scopes` have the shapes of the uniform choice; `curves` and `sensitivities` follow their banks.
    """
    banks = [bank for scope in scopes for bank in scope.banks]
    menus = [_menu(bank, keep) for bank in banks]
    weights = [sensitivity**DAMPING for sensitivity in sensitivities]
    if not any(weights):  # nothing tells the banks apart but their errors
        weights = [1.0] * len(weights)
    costs = [
        [weight * curve(option.stored_parameters / option.original_parameters) ** ERROR_POWER for option in menu]
        for menu, curve, weight in zip(menus, curves, weights, strict=True)
    ]
    sizes = [[option.stored_parameters for option in menu] for menu in menus]
    chosen = iter(choose(costs, sizes, sum(bank.stored_parameters for bank in banks)))
    choices = iter(
        dataclasses.replace(menu[j], predicted_error=curve(menu[j].stored_parameters / menu[j].original_parameters))
        for menu, curve, j in zip(menus, curves, chosen, strict=True)
    )
    return [dataclasses.replace(scope, banks=tuple(next(choices) for _ in scope.banks)) for scope in scopes]


def _menu(bank: BankPlan, keep: float) -> list[BankPlan]:
    """Shapes of one bank around the uniform one, in ascending size."""
    reach = REACH * min(keep, 1 - keep)
    options = {bank.stored_parameters: bank}
    for number in range(-int(reach / STEP), int(reach / STEP) + 1):
        try:
            rank, num_bases = choose_shape(bank.num_matrices, bank.rows, bank.columns, keep + number * STEP)
        except SettingsError:  # too little for a single basis
            continue
        option = dataclasses.replace(bank, rank=rank, num_bases=num_bases)
        options.setdefault(option.stored_parameters, option)
    return [options[size] for size in sorted(options)]


def measure_curve(weights: Tensor, bank: BankPlan, config: CompressConfig) -> ErrorCurve:
    """Error against size of a bank, by two short fits to its experts (E, P, D); flat where none smaller can be had."""
    original = bank.original_parameters
    share, shape = bank.stored_parameters / original, (bank.num_matrices, bank.rows, bank.columns)
    rank, num_bases = choose_shape(*shape, max(SMALLER * share, lowest_keep(*shape)))
    smaller = dataclasses.replace(bank, rank=rank, num_bases=num_bases)
    level, other = (_short_fit(weights, option, config) for option in (bank, smaller))
    distance = share - smaller.stored_parameters / original
    slope = math.log(other / level) / distance if distance > 0 and level > 0 and other > 0 else 0.0
    return ErrorCurve(share, level, max(0.0, slope))


def _short_fit(weights: Tensor, bank: BankPlan, config: CompressConfig) -> float:
    """The error that a full fit of this shape can be expected to end at."""
    fit = config.fit_config(bank.rank, bank.num_bases)
    fit = dataclasses.replace(fit, max_steps=min(SHORT_STEPS, fit.max_steps), align_steps=SHORT_ALIGNMENTS)
    return FULL_FACTOR * fit_bank(weights, fit).history[-1] ** FULL_EXPONENT


def obstacle(checkpoint: Checkpoint, config: CompressConfig, num_banks: int) -> str | None:
    """Why the budget is not to be allocated: asked otherwise, nothing to choose, or a model too large to run."""
    if config.allocation == "uniform" or config.keep is None:
        return "the settings give it a shape" if config.keep is None else "that is asked for"
    if num_banks == 1:
        return "there is one bank"
    if config.factor_dtype.startswith("int"):
        return "with factors in few bits it has not been measured what an allocation is worth"
    place = _place(checkpoint, config)
    return place.obstacle if place.device is None else None


def _place(checkpoint: Checkpoint, config: CompressConfig) -> Place:
    return find_place(checkpoint, config.device, torch.float32.itemsize)


def allocated(
    checkpoint: Checkpoint,
    layers: Mapping[int, ExpertLayer],
    scopes: Sequence[Scope],
    config: CompressConfig,
    windows: Tensor | None = None,
) -> list[Scope]:
    """The uniform `scopes` with the budget shared out by what was measured on the weights and the model itself.

    The model is run on some of the token windows (N, length) of a text, or on random tokens.
    """
    assert config.keep is not None
    banks = [bank for scope in scopes for bank in scope.banks]
    with explained_exhaustion(f"planning on {config.device}", FITS_EXHAUSTED):
        curves = [measure_curve(read_stack(checkpoint, layers, bank).weights, bank, config) for bank in banks]
    device = _place(checkpoint, config).device
    assert device is not None
    model = load(checkpoint.fetched(), device, torch.float32)
    if windows is None:
        windows = random_windows(model, config.seed)
    windows = windows[:: math.ceil(len(windows) / NUM_WINDOWS)]
    found = measure_sensitivities(model, windows, {index for bank in banks for index in bank.layers}, config.seed)
    sensitivities = [
        sum(float(found[index, family].sum()) for index in bank.layers for family in bank.families) for bank in banks
    ]
    return allocate(scopes, curves, sensitivities, config.keep)
