"""The budget shared out by what was measured on the weights and the model itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from globe.bank_shape import BankShape
from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint
from globe.experts.stack import read_stack
from globe.machine.memory import FITS_EXHAUSTED, explained_exhaustion
from globe.measure.placed import placed_sensitivities
from globe.measure.runnable import Place, find_place, has_room
from globe.measure.sensitivity import NUM_WINDOWS
from globe.plan.allocate import REACH, ErrorCurve, allocate
from globe.plan.budget import Keep, least_share
from globe.plan.scopes import BankPlan, Scope
from globe.plan.settings import CompressConfig
from globe.run.ranks import ALONE, Ranks
from globe.train.fit_banks import fit_bank

SHORT_STEPS, SHORT_ALIGNMENTS = 20, 32
"""Of the fits that tell error against size."""
GAIN, GAIN_STEPS = 0.35, 25
"""Of a fit of n steps over a short one, in the sense of `ErrorCurve`: GAIN (1 − √(GAIN_STEPS / n)); measured, see
docs/log.md."""


def obstacle(checkpoint: Checkpoint, config: CompressConfig, num_banks: int) -> str | None:
    """Why the budget is not to be allocated: asked otherwise, nothing to choose, or a model too large to run."""
    if not isinstance(config.budget, Keep):
        return "the settings give it a shape"
    if config.allocation == "uniform":
        return "that is asked for"
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
    folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> list[Scope]:
    """The uniform `scopes` with the budget shared out by what was measured on the weights and the model itself.

    The model is run on some of the token windows (N, length) of a text, or on random tokens; one that does not fit into
    memory keeps files in the folder meanwhile.
    """
    budget = config.budget
    assert isinstance(budget, Keep)
    banks = [bank for scope in scopes for bank in scope.banks]
    curves = ranks.map(functools.partial(_curve, checkpoint, layers, config), banks)
    place, measured = _place(checkpoint, config), {index for bank in banks for index in bank.layers}
    if not has_room(checkpoint, place, ranks.num_here):
        ranks = ALONE
    settings = (windows, measured, NUM_WINDOWS, config.seed, folder)
    by_family = ChainMap(*ranks.together(placed_sensitivities, place, checkpoint, *settings))
    sensitivities = [
        sum(float(by_family[index, family].sum()) for index in bank.layers for family in bank.families)
        for bank in banks
    ]
    return allocate(scopes, curves, sensitivities, budget)


def _curve(
    checkpoint: Checkpoint, layers: Mapping[int, ExpertLayer], config: CompressConfig, bank: BankPlan
) -> ErrorCurve:
    with explained_exhaustion(f"planning on {config.device}", FITS_EXHAUSTED):
        return measure_curve(read_stack(checkpoint, layers, bank).weights, bank.shape, config)


def measure_curve(weights: Tensor, bank: BankShape, config: CompressConfig) -> ErrorCurve:
    """Error against size of a bank, by two short fits to its experts (E, P, D), half of `REACH` to either side.

    Flat where no two sizes can be had.
    """
    aside = REACH / 2 * min(bank.share, 1 - bank.share)
    smaller = Keep(max(bank.share - aside, least_share(bank.matrices))).shape_for(bank.matrices)
    larger = Keep(bank.share + aside).shape_for(bank.matrices)
    distance = larger.share - smaller.share
    level, other = (_short_error(weights, option, config) for option in (smaller, larger))
    slope = math.log(level / other) / distance if distance > 0 and level > 0 and other > 0 else 0.0
    gain = GAIN * max(0.0, 1 - math.sqrt(GAIN_STEPS / config.steps))
    return ErrorCurve(smaller.share, level, max(0.0, slope), gain)


def _short_error(weights: Tensor, bank: BankShape, config: CompressConfig) -> float:
    fit = config.fit_config(bank)
    fit = dataclasses.replace(fit, max_steps=min(SHORT_STEPS, fit.max_steps), align_steps=SHORT_ALIGNMENTS)
    return fit_bank(weights, fit).history[-1]


def _place(checkpoint: Checkpoint, config: CompressConfig) -> Place:
    return find_place(checkpoint, config.device, torch.float32.itemsize)
