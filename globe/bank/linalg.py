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


_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def approximate_polar(x: Tensor) -> Tensor:
    """`polar` by matrix products alone: x times eight polynomials in xᵀx (Amsel et al. 2025, Polar Express).

    Singular values above a thousandth of the Frobenius norm come to within 1e-3 of 1, smaller ones stay below it.
    """
    x = x / (1.01 * norms(x)[:, None, None]).clamp_min(torch.finfo(x.dtype).tiny)
    for a, b, c in _POLAR_EXPRESS:
        gram = x.mT @ x
        x = torch.baddbmm(x, x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), beta=a)
    return x


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
