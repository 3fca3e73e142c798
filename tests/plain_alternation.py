"""Alignment step by step, as a reference."""

from __future__ import annotations

from torch import Tensor

from globe.bank.factors import mix
from globe.bank.linalg import polar
from globe.init.procrustes import initial_frames, low_rank


def plain_alternation(weights: Tensor, rank: int, num_bases: int, steps: int) -> list[float]:
    """The errors of exact alternation, nothing extrapolated."""
    frames, errors = initial_frames(weights, rank), list[float]()
    for _ in range(steps):
        codes, bases, _ = low_rank(frames.mT @ weights, num_bases)
        errors.append(float((weights - frames @ mix(codes, bases)).norm() / weights.norm()))
        frames = polar(weights @ mix(codes, bases).mT)
    return errors
