"""Rounding with error feedback (GPTQ, Frantar et al. 2023, arXiv 2210.17323, eq. 2 and 3 and algorithm 1).

    min ‖(W − Ŵ) C^{1/2}‖: inputs are rounded one after the other, and after input i the ones not yet rounded, j > i,
    are moved by −(w_i − ŵ_i) U_ij / U_ii, with U the upper Cholesky factor of C⁻¹

C is the second moment of the layer's inputs for gate and up, of the expert's own inner activation for `down`, damped.
Grids and groups are those of `benchmarks.rivals.rounding`, fixed when a group's first input is reached; for `down`,
where a group lies across the outputs, that is each input of its own. The range of a group is the best of a few narrower
ones for its squared error, which the paper's code leaves as an option and which pays below 4 bits.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.calibration import Calibration, damped
from benchmarks.rivals.rounding import GROUP, grid, in_groups, round_to, rounded
from benchmarks.stacks import Approximation, Stacks

DAMPING = 0.03
"""Share of its mean diagonal that is added to a second moment before it is inverted, chosen by
`benchmarks.rival_settings`; GPTQ's code adds 0.01."""
SHRINKS = tuple(1 - 0.05 * step for step in range(11))


def best_grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and offset (…, 1) of the range whose rounding has the lowest squared error on groups (…, N)."""
    scales, offsets = zip(*(grid(groups, bits, shrink) for shrink in SHRINKS), strict=True)
    scale, offset = torch.stack(scales), torch.stack(offsets)
    errors = (round_to(groups, scale, offset, bits) - groups).square().sum(-1, keepdim=True)
    best = errors.argmin(0, keepdim=True)
    return scale.gather(0, best)[0], offset.gather(0, best)[0]


def round_with_feedback(weights: Tensor, moment: Tensor, bits: int, across_outputs: bool, group: int = GROUP) -> Tensor:
    """Ŵ (E, N, K) of weights (E, N, K) with N inputs and K outputs, given the inputs' C (1 or E, N, N).

    Groups lie along the outputs or, otherwise, along the inputs.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment, DAMPING)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    now, result = weights.clone(), torch.empty_like(weights)
    scale = offset = weights.new_empty(0)
    for place in range(weights.shape[1]):
        row = now[:, place]
        if across_outputs:
            groups = in_groups(row, group)
            result[:, place] = round_to(groups, *best_grid(groups, bits), bits).flatten(-2)
        else:
            if place % group == 0:
                scale, offset = (found[..., 0] for found in best_grid(now[:, place : place + group].mT, bits))
            result[:, place] = round_to(row, scale, offset, bits)
        step = (row - result[:, place]) / upper[:, place, place, None]
        now[:, place + 1 :] -= upper[:, place, place + 1 :, None] * step[:, None]
    return result


def gptq(stacks: Stacks, bits: int, calibration: Calibration, group: int = GROUP) -> Approximation:
    """Round every weight to `bits`, feeding the error back to the inputs that are still to come."""
    began, approximation = time.monotonic(), {}
    for key, experts in stacks.items():
        moment = calibration.moment(*key)
        if key[1] == "down":
            approximation[key] = round_with_feedback(experts, moment, bits, across_outputs=True, group=group)
        else:
            in_groups(experts, group)  # refuse a ragged last group
            approximation[key] = round_with_feedback(experts.mT, moment, bits, across_outputs=False, group=group).mT
    return rounded(approximation, group, began)
