"""D²-MoE's delta decompression (Gu et al. 2025, arXiv 2502.17298): a base for all experts, a low rank for each.

    W_e ≈ W_b + U_e V_e,   W_b = Σ_e w_e W_e / Σ_e w_e,   U_e V_e = whitened truncated SVD of W_e − W_b

The differences are cut off in the metric of the inputs, as the paper does (`benchmarks.rivals.whitened_svd`). Its base
is weighted by the experts' Fisher information, which takes gradients; here w_e is how often the expert is routed to.
Its pruning of the base is left out, since it is meant for a few large experts.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.calibration import Calibration
from benchmarks.rivals.whitened_svd import whitened_factors
from benchmarks.stacks import Approximation, Stacks
from globe.errors import SettingsError


def delta_rank(num_experts: int, rows: int, columns: int, keep: float) -> int:
    """The largest r that leaves P·D + E·r(P + D) parameters at most `keep` of E·P·D.

    Raises `SettingsError` when not even 1 fits.
    """
    rank = int((keep * num_experts - 1) * rows * columns / (num_experts * (rows + columns)))
    if rank < 1:
        raise SettingsError(f"keep {keep:g} leaves no rank beside the base of {num_experts} experts {rows} x {columns}")
    return rank


def base_weight(experts: Tensor, counts: Tensor) -> Tensor:
    """W_b (P, D) of experts (E, P, D), weighted by the tokens (E,) that they get."""
    return (experts * (counts / counts.sum())[:, None, None]).sum(0)


def d2_moe(stacks: Stacks, keep: float, dtype: torch.dtype, calibration: Calibration) -> Approximation:
    """Store at most `keep` of the parameters of every layer and family, in `dtype`."""
    began, approximation, stored, ranks = time.monotonic(), {}, 0, set[int]()
    for (layer, family), experts in stacks.items():
        base = base_weight(experts, calibration.layers[layer].counts)
        rank = delta_rank(*experts.shape, keep)
        factors = whitened_factors(experts - base, calibration.moment(layer, family), family, rank)
        rounded = [factor.to(dtype) for factor in (base, *factors)]
        base, left, right = (factor.float() for factor in rounded)
        approximation[layer, family] = base + left @ right
        stored += sum(factor.numel() for factor in rounded)
        ranks.add(rank)
    return Approximation(approximation, stored, f"r={', '.join(map(str, sorted(ranks)))}", time.monotonic() - began)
