"""WaterSIC (arXiv 2603.04956): feedback with a step of its own for every input, rounding, and entropy coding.

    input i rounded to multiples of α_i = c / √d_i,   d_i = 1 / U_ii²,   U the upper Cholesky factor of C⁻¹

An error in input i costs d_i after feedback, so all inputs lose the same, c² / 12 for an entry, and rates differ: that
is water-filling in the layer. One level c for the experts of a layer and family is found so that the rate is as asked;
layers and families get equal rates. After rounding an input is scaled to its least-squares fit, before its error is
fed back, as in the authors' code. That code has a scale for every output too, 16 bits for each, and drift correction
and fine-tuning, which are left out, the last two here as in all methods.

Nothing is packed: the rate is an entropy, as the authors report theirs. Theirs is that of all entries of a matrix
together; here each input has a distribution of its own, over all experts where they share their inputs, corrected for
its bias (Miller and Madow), which is lower and is what an adaptive coder comes near. 16 bits for the scale of an input
are counted: once for all experts for gate and up, where the scales follow from the layer's C, and for every expert for
down.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from benchmarks.calibration import Calibration, damped
from benchmarks.rivals.gptq import DAMPING
from benchmarks.stacks import Approximation, Stacks, as_inputs
from globe.errors import SettingsError
from globe.quant.feedback import Order, code_inputs, order_inputs

SCALE_BITS = 16
TOLERANCE = 0.002
"""Bits below the budget at which the search for the level stops."""
SEARCHES = 16


def entropy_bits(symbols: Tensor) -> Tensor:
    """Bits (G,) in which n whole numbers (G, n) can be coded, each row by its own distribution."""
    G, n = symbols.shape
    least = symbols.min()
    size = int(symbols.max() - least) + 1
    places = (symbols - least).long() + size * torch.arange(G)[:, None]
    counts = torch.bincount(places.flatten(), minlength=G * size).view(G, size).double()
    entropies = -(torch.special.xlogy(counts, counts / n)).sum(1) / math.log(2)
    return entropies + ((counts > 0).sum(1) - 1) / (2 * math.log(2))


def code_at(X: Tensor, order: Order, level: float) -> tuple[Tensor, float]:
    """What X (E, N, K) decodes to at a level c, and the bits of its symbols."""
    is_shared, bits = len(order.prices) == 1, 0.0
    steps = level / order.prices.sqrt()

    def code_rows(i: int, rows: Tensor) -> Tensor:
        nonlocal bits
        groups = rows.reshape(1, -1) if is_shared else rows
        unit = groups / steps[:, i, None]
        symbols = unit.round()
        bits += float(entropy_bits(symbols).sum())
        fit = (symbols * unit).sum(1) / symbols.square().sum(1).clamp_min(1)
        return (symbols * (fit * steps[:, i]).half()[:, None].float()).view(rows.shape)

    coded = code_inputs(order.sort(X), order, code_rows)
    return order.unsort(coded), bits


def code_within(X: Tensor, order: Order, budget: float) -> tuple[Tensor, float]:
    """What X decodes to at the level whose symbols take at most `budget` bits, and the bits that they take."""
    slack = TOLERANCE * X.numel()
    rates = 0.5 * torch.log2(2 * math.pi * math.e * order.sort(X).square().mean(2) * order.prices)
    log_level = float(rates.mean()) - budget / X.numel()
    too_fine, coarse = -math.inf, math.inf
    best: tuple[Tensor, float] | None = None
    for _ in range(SEARCHES):
        coded, bits = code_at(X, order, 2.0**log_level)
        if bits > budget:
            too_fine = log_level
        else:
            coarse, best = log_level, (coded, bits)
            if budget - bits <= slack:
                break
        log_level += (bits - budget + slack / 2) / X.numel()  # a bit halves the step, or nearly
        if not too_fine < log_level < coarse:
            log_level = (too_fine + coarse) / 2
    if best is None:
        raise SettingsError(f"no level found at which {X.numel()} weights take {budget:.0f} bits")
    return best


def watersic(stacks: Stacks, bits: float, calibration: Calibration) -> Approximation:
    """Code every layer and family in at most `bits` a weight, as entropy, the scales counted."""
    began, approximation, total = time.monotonic(), {}, 0.0
    for key, experts in stacks.items():
        X = as_inputs(experts, key[1]).contiguous()
        order = order_inputs(damped(calibration.moment(*key), DAMPING))
        side = SCALE_BITS * order.prices.numel()
        coded, taken = code_within(X, order, bits * X.numel() - side)
        approximation[key] = as_inputs(coded, key[1])
        total += taken + side
    weights = sum(experts.numel() for experts in stacks.values())
    seconds = time.monotonic() - began
    return Approximation(approximation, weights, "entropy", seconds, bits=total / weights)
