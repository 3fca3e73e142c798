"""The aligned warm start for experts that are read a part at a time, none of them kept.

The same alternation as `globe.init.procrustes`, with orthogonal iteration in place of the E x E Gram matrix: frames are
made anew from codes and bank on each visit, so that codes and bank are all that a pass hands to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from globe.bank.factors import mix
from globe.bank.linalg import eigh, norms, polar, solve_positive
from globe.bank.objective import expert_chunks
from globe.errors import GlobeError
from globe.init.procrustes import initial_frames

Read = Callable[[int], Tensor]
"""The experts (E_i, P, D) of a part, the same on every call."""


def sketch(read: Read, slices: Sequence[slice], rank: int, num_bases: int, seed: int) -> tuple[Tensor, float]:
    """A bank to begin from, M random mixtures of the experts in their first frames (the randomised range finder of
    Halko, Martinsson and Tropp 2011), (M, R, D), and the experts' energy ‖W‖².

    Raises `GlobeError` for experts that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    draws, bases, energy = torch.randn(slices[-1].stop, num_bases, generator=generator), None, 0.0
    for index, place in enumerate(slices):
        weights = read(index)
        energy += float(norms(weights).square().sum())
        if not math.isfinite(energy):
            raise GlobeError("experts hold NaN or Inf; mend the weights before fitting them")
        if bases is None:
            bases = weights.new_zeros(num_bases, rank, weights.shape[2])
        mixtures = draws[place].to(weights)
        for part in expert_chunks(weights, num_bases):
            aligned = initial_frames(weights[part], rank).mT @ weights[part]
            bases.flatten(1).addmm_(mixtures[part].mT, aligned.flatten(1))
    assert bases is not None
    return bases, energy


def align_pass(
    read: Read, slices: Sequence[slice], rank: int, codes: Tensor | None, bases: Tensor
) -> tuple[Tensor, Tensor, float]:
    """One visit to all experts: frames from T, codes from frames and bank, then the bank from frames and codes.

    Each is the exact minimiser of Σ_e ‖W_e − Q_e T_e‖² over its own variable, so the error never rises. `codes` (E, M)
    of an earlier pass, None for the first, whose frames are `initial_frames`; `bases` (M, R, D) are used up. Returns
    codes, bases and the squared error that the codes met before the bank moved.
    """
    values, vectors = eigh(bases.flatten(1) @ bases.flatten(1).mT)
    roots = values.clamp_min(torch.finfo(bases.dtype).eps * values[-1]).sqrt()
    bases.copy_(((vectors / roots).mT @ bases.flatten(1)).view_as(bases))  # orthonormal
    mixtures = None if codes is None else (codes @ vectors) * roots
    new_codes = bases.new_empty(slices[-1].stop, len(bases))
    sums, missed = torch.zeros_like(bases), 0.0
    for index, place in enumerate(slices):
        weights = read(index)
        for part in expert_chunks(weights, len(bases)):
            experts, own = weights[part], slice(place.start + part.start, place.start + part.stop)
            if mixtures is None:
                frames = initial_frames(experts, rank)
            else:
                frames = polar(experts @ mix(mixtures[own], bases).mT)
            aligned = (frames.mT @ experts).flatten(1)
            new_codes[own] = aligned @ bases.flatten(1).mT
            missed += float(norms(experts).square().sum() - new_codes[own].square().sum())
            sums.flatten(1).addmm_(new_codes[own].mT, aligned)
    moved = solve_positive(new_codes.mT @ new_codes, sums.flatten(1), 1e-9)[0].contiguous()
    return new_codes, moved.view_as(bases), max(0.0, missed)
