"""The budget shared out by what was measured on the weights and the model itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint
from globe.experts.stack import read_stack
from globe.machine.memory import FITS_EXHAUSTED, explained_exhaustion
from globe.measure.runnable import Place, find_place
from globe.measure.sensitivity import NUM_WINDOWS, measure_sensitivities, random_windows
from globe.model.loading import load
from globe.plan.allocate import ErrorCurve, allocate
from globe.plan.scopes import BankPlan, Scope, choose_shape, lowest_keep
from globe.plan.settings import CompressConfig
from globe.train.fit_banks import fit_bank

SHORT_STEPS, SHORT_ALIGNMENTS = 20, 8
"""Of the fits that tell error against size."""


FULL_EXPONENT, FULL_FACTOR = 1.4, 1.15
"""A fit with the default settings ends at about this multiple of this power of the short fit's error."""


SMALLER = 0.8
"""Size of the second fit over that of the first."""


def obstacle(checkpoint: Checkpoint, config: CompressConfig, num_banks: int) -> str | None:
    """Why the budget is not to be allocated: asked otherwise, nothing to choose, or a model too large to run."""
    if config.allocation == "uniform" or config.keep is None:
        return "the settings give it a shape" if config.keep is None else "that is asked for"
    if num_banks == 1:
        return "there is one bank"
    place = _place(checkpoint, config)
    return place.obstacle if place.device is None else None


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


def _place(checkpoint: Checkpoint, config: CompressConfig) -> Place:
    return find_place(checkpoint, config.device, torch.float32.itemsize)
