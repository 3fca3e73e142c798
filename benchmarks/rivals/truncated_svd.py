"""Truncated SVD of every expert alone: W_e ≈ U_r S_r V_rᵀ, the best of its rank (Eckart and Young 1936)."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.stacks import Approximation, Stacks
from globe.errors import SettingsError


def svd_rank(rows: int, columns: int, keep: float) -> int:
    """The largest rank whose r(P + D) parameters are at most `keep` of P·D; `SettingsError` when not even 1 fits."""
    rank = int(keep * rows * columns / (rows + columns))
    if rank < 1:
        raise SettingsError(f"keep {keep:g} leaves no rank for matrices of {rows} x {columns}; choose a larger keep")
    return rank


def factorise(experts: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r S_r (E, P, r) and V_rᵀ (E, r, D) of experts (E, P, D)."""
    u, s, vh = torch.linalg.svd(experts, full_matrices=False)
    return u[:, :, :rank] * s[:, None, :rank], vh[:, :rank]


def truncated_svd(stacks: Stacks, keep: float, dtype: torch.dtype) -> Approximation:
    """Store at most `keep` of the parameters of every expert, in `dtype`."""
    began, approximation, stored, ranks = time.monotonic(), {}, 0, set[int]()
    for key, experts in stacks.items():
        rank = svd_rank(experts.shape[1], experts.shape[2], keep)
        left, right = (factor.to(dtype) for factor in factorise(experts, rank))
        approximation[key] = left.float() @ right.float()
        stored += left.numel() + right.numel()
        ranks.add(rank)
    return Approximation(approximation, stored, f"r={', '.join(map(str, sorted(ranks)))}", time.monotonic() - began)
