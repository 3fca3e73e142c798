"""Truncated SVD in the metric of what the matrix multiplies (SVD-LLM, Wang et al. 2025, arXiv 2403.07378, section 3.1).

    min ‖(W − Ŵ) L‖_F over rank r, L Lᵀ = C:   W L = U S Vᵀ,   Ŵ = U_r S_r V_rᵀ L⁻¹

with the Cholesky factor L of the second moment C of the inputs, so that what is cut off is what the outputs lose. For
`down`, which is transposed here, the inputs are the expert's own inner activations and L stands on the other side.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.calibration import Calibration, damped
from benchmarks.rivals.truncated_svd import factorise, svd_rank
from benchmarks.stacks import Approximation, Stacks
from globe.terms import Family


def whitened_factors(experts: Tensor, moment: Tensor, family: Family, rank: int) -> tuple[Tensor, Tensor]:
    """(E, P, r) and (E, r, D) for experts (E, P, D), given `Calibration.moment` of their layer and family."""
    root = torch.linalg.cholesky(damped(moment))
    if family == "down":
        left, right = factorise(root.mT @ experts, rank)
        return torch.linalg.solve_triangular(root.mT, left, upper=True), right
    left, right = factorise(experts @ root, rank)
    return left, torch.linalg.solve_triangular(root, right, upper=False, left=False)


def whitened_svd(stacks: Stacks, keep: float, dtype: torch.dtype, calibration: Calibration) -> Approximation:
    """Store at most `keep` of the parameters of every expert, in `dtype`."""
    began, approximation, stored, ranks = time.monotonic(), {}, 0, set[int]()
    for key, experts in stacks.items():
        rank = svd_rank(experts.shape[1], experts.shape[2], keep)
        factors = whitened_factors(experts, calibration.moment(*key), key[1], rank)
        left, right = (factor.to(dtype) for factor in factors)
        approximation[key] = left.float() @ right.float()
        stored += left.numel() + right.numel()
        ranks.add(rank)
    return Approximation(approximation, stored, f"r={', '.join(map(str, sorted(ranks)))}", time.monotonic() - began)
