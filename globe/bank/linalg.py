"""Batched factorisations and products, and the one place that knows which devices lack them.

Apple's MPS has no symmetric eigensolver, SVD or Cholesky with a status, so those run on the CPU there.
"""

# `torch.linalg` has no type stubs: it is called from this module alone, where every result is cast.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def _capable(x: Tensor) -> Tensor:
    return x.cpu() if x.device.type == "mps" else x


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each pair of items along the leading dimension: (N, ...), (N, ...) -> (N,)."""
    return cast(Tensor, torch.linalg.vecdot(x.flatten(1), y.flatten(1)))


def norms(x: Tensor) -> Tensor:
    """Frobenius norm of each item along the leading dimension: (N, ...) -> (N,)."""
    return cast(Tensor, torch.linalg.vector_norm(x.flatten(1), dim=1))


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors of symmetric matrices (..., N, N)."""
    values, vectors = cast(tuple[Tensor, Tensor], torch.linalg.eigh(_capable(x)))
    return values.to(x.device), vectors.to(x.device)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition U, S, Vh of matrices (..., N, K)."""
    u, s, vh = cast(tuple[Tensor, Tensor, Tensor], torch.linalg.svd(_capable(x), full_matrices=False))
    return u.to(x.device), s.to(x.device), vh.to(x.device)


def polar(x: Tensor) -> Tensor:
    """The orthonormal polar factor of (..., N, K), N >= K: the maximiser of tr(Qᵀ x) over QᵀQ = I."""
    u, _, vh = svd(x)
    return u @ vh


def solve_positive(gram: Tensor, rhs: Tensor, ridge: float) -> tuple[Tensor, int]:
    """Solve (G + ridge·mean(diag G)·I) X = rhs for symmetric positive semidefinite G, batched.

    Shapes: `gram` (..., N, N), `rhs` (..., N, K). Cholesky serves all but the matrices whose factorisation fails;
    those are solved in the least-squares sense from their eigenvectors. Returns the solution and how many failed.
    """
    home = gram.device
    gram, rhs = _capable(gram), _capable(rhs)
    shifted = gram.clone()
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * diagonal.mean(-1, keepdim=True) + torch.finfo(gram.dtype).tiny
    factor, info = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(shifted))
    failed = info > 0
    num_failed = int(failed.sum())
    if num_failed == 0:
        return torch.cholesky_solve(rhs, factor).to(home), 0
    safe = torch.where(failed[..., None, None], torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), factor)
    solution = torch.cholesky_solve(rhs, safe)
    solution[failed] = _pseudo_solve(shifted[failed], rhs.expand(*gram.shape[:-1], -1)[failed])
    return solution.to(home), num_failed


def _pseudo_solve(gram: Tensor, rhs: Tensor) -> Tensor:
    """Minimum-norm solution with eigenvalues below eps·N·max dropped; NaN in gives NaN out."""
    finite = gram.isfinite().all(-1).all(-1)
    values, vectors = eigh(torch.where(finite[:, None, None], gram, 0.0))
    floor = torch.finfo(gram.dtype).eps * gram.shape[-1] * values.amax(-1, keepdim=True).clamp_min(0)
    inverse = torch.where(values > floor, 1 / values, 0.0)
    solution = vectors @ (inverse[..., None] * (vectors.mT @ rhs))
    return torch.where(finite[:, None, None], solution, torch.nan)


def cholesky_of_inverse(gram: Tensor, ridge: float = 1e-6) -> Tensor:
    """The upper triangular U with UᵀU = (G + ridge·mean(diag G)·I)⁻¹ for positive semidefinite G (..., N, N).

    The ridge grows tenfold until the factorisation of every matrix succeeds.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    tiny = torch.finfo(gram.dtype).tiny
    while True:
        shifted = _capable(gram + (ridge * diagonal + tiny) * identity)
        factor, info = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(shifted))
        if not bool((info > 0).any()):
            upper, info = cast(
                tuple[Tensor, Tensor], torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            )
            if not bool((info > 0).any()):
                return upper.to(gram.device)
        if not ridge < 1:
            raise ValueError("the matrices are not positive semidefinite, or not finite")
        ridge *= 10
