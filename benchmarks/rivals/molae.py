"""MoLAE made from a trained model (Liu et al. 2025, arXiv 2503.23100): one latent space for all experts of a layer.

    min Σ_e ‖W_e − A_e B‖²_F:   [W_1; …; W_E] = U S Vᵀ,   B = V_rᵀ,   A_e = W_e V_r

Every family of a layer has its own B. `down` enters transposed, so that its latent space, like the paper's, is on the
hidden side. The paper lets groups of experts share B and may leave `down` alone; here all experts of a layer share it.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.stacks import Approximation, Stacks
from globe.errors import SettingsError


def latent_rank(num_experts: int, rows: int, columns: int, keep: float) -> int:
    """The largest r whose r(E·P + D) parameters are at most `keep` of E·P·D; `SettingsError` when not even 1 fits."""
    rank = int(keep * num_experts * rows * columns / (num_experts * rows + columns))
    if rank < 1:
        raise SettingsError(f"keep {keep:g} leaves no latent space for {num_experts} experts of {rows} x {columns}")
    return rank


def shared_factor(experts: Tensor, rank: int) -> Tensor:
    """B (r, D), the leading right singular vectors of the stacked experts (E, P, D)."""
    return torch.linalg.svd(experts.flatten(0, 1), full_matrices=False)[2][:rank]


def molae(stacks: Stacks, keep: float, dtype: torch.dtype) -> Approximation:
    """Store at most `keep` of the parameters of every layer and family, in `dtype`."""
    began, approximation, stored, ranks = time.monotonic(), {}, 0, set[int]()
    for key, experts in stacks.items():
        right = shared_factor(experts, latent_rank(*experts.shape, keep))
        adapters, right = (experts @ right.mT).to(dtype), right.to(dtype)
        approximation[key] = adapters.float() @ right.float()
        stored += adapters.numel() + right.numel()
        ranks.add(right.shape[0])
    return Approximation(approximation, stored, f"r={', '.join(map(str, sorted(ranks)))}", time.monotonic() - began)
