"""Experts, codes and bases to test the mathematics on: random ones, and planted ones whose factors are known."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Standard normal, the same for the same seed and shape in either precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def simplex(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Uniform on the simplex, rows that sum to 1."""
    drawn = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=F64)
    exponential = -drawn.clamp_min(1e-300).log()
    return (exponential / exponential.sum(1, keepdim=True)).to(dtype)


def orthonormal(batch: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Matrices (batch, rows, columns) with orthonormal columns."""
    return torch.linalg.qr(normal(batch, rows, columns, seed=seed))[0]


def planted_alignment(
    num_experts: int = 8, rows: int = 5, columns: int = 12, rank: int = 5, num_bases: int = 2, seed: int = 0
) -> Tensor:
    """W_e = Q_e Σ_j a_ej B_j with orthonormal Q_e: aligned, the experts have rank M."""
    mixed = normal(num_experts, num_bases, seed=seed) @ normal(num_bases, rank * columns, seed=seed + 1)
    return orthonormal(num_experts, rows, rank, seed=seed + 2) @ mixed.view(num_experts, rank, columns)


def second_moment(columns: int, seed: int = 0) -> Tensor:
    """A positive definite C (D, D)."""
    root = normal(columns, columns + 3, seed=seed)
    return root @ root.mT / columns
