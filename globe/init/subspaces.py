"""Warm starts from each expert's own singular vectors, and from the geometry of its row space."""

from __future__ import annotations

from torch import Tensor

from globe.bank.linalg import eigh, polar, svd


def peak_signs(rows: Tensor) -> Tensor:
    """The sign of each row's largest entry, (E, R, 1): singular vectors are given up to that sign only."""
    return rows.gather(2, rows.abs().argmax(2, keepdim=True)).sign()


def right_singular_rows(weights: Tensor, rank: int) -> Tensor:
    """The leading R right singular vectors of every expert as rows, (E, R, D); signs fixed by the largest entry."""
    rows = svd(weights)[2][:, :rank]
    return rows * peak_signs(rows)


def left_gram_rows(weights: Tensor, rank: int) -> Tensor:
    """U_Rᵀ W_e, U_R the leading eigenvectors of the P x P left Gram matrix W_e W_eᵀ: the rows carry their energy."""
    vectors = eigh(weights @ weights.mT)[1].flip(2)[:, :, :rank]
    rows = vectors.mT @ weights
    return rows * peak_signs(rows)


def tangent_rows(weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Each expert's row space in the tangent space of the Grassmannian at the mean row space.

    The base point Y (R, D) spans the leading eigenvectors of Σ_e V_eᵀV_e; the tangent vector is the logarithm
    Δ_e = atan-scaled (V_e Yᵀ)⁻¹ V_e (I − YᵀY) (Absil, Mahony and Sepulchre 2008). Returns Y and the Δ_e (E, R, D).
    """
    rows = svd(weights)[2][:, :rank]
    mean = eigh((rows.mT @ rows).sum(0))[1].flip(1)[:, :rank].mT
    aligned = polar(mean @ rows.mT) @ rows  # the frame of the row space nearest to the base point
    normal = aligned - (aligned @ mean.mT) @ mean
    left, sines, right = svd(normal)
    return mean, left @ (sines.clamp(max=1).asin()[:, :, None] * right)
