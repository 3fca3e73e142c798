"""The aligned warm start: experts are rotated into a common frame before they share a bank.

An expert's intermediate index is arbitrary, so the stacked vec(W_e) of a plain PCA are not comparable. Aligning them is
generalised Procrustes analysis (Gower 1975) with a low-rank mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from globe.bank.factors import mix
from globe.bank.linalg import approximate_polar, eigh, norms, polar, svd
from globe.bank.objective import expert_chunks
from globe.init.subspaces import peak_signs


def low_rank(stacked: Tensor, num_bases: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-M approximation of the stacked vectors of (E, R, D), from the E x E Gram matrix.

    Returns orthonormal codes (E, M), bases (M, R, D) in descending order of energy, and the spectrum (E,) of singular
    values, descending.
    """
    flat = stacked.flatten(1)
    values, vectors = eigh(flat @ flat.mT)
    codes = vectors[:, -num_bases:].flip(1)
    spectrum = values.flip(0).clamp_min(0).sqrt()
    return codes, (codes.mT @ flat).view(num_bases, *stacked.shape[1:]), spectrum


def initial_frames(weights: Tensor, rank: int) -> Tensor:
    """Q_e (E, P, R): the identity when R = P, else the leading left singular vectors.

    The sign of a singular vector is the solver's whim; it is chosen so that Q_eᵀW_e are the experts' `left_gram_rows`.
    """
    num_experts, rows, _ = weights.shape
    if rank == rows:
        return torch.eye(rows, dtype=weights.dtype, device=weights.device).expand(num_experts, rows, rows)
    frames = weights.new_empty(num_experts, rows, rank)
    for part in expert_chunks(weights):
        left, _, right = svd(weights[part])
        frames[part] = (left * peak_signs(right).mT)[:, :, :rank]
    return frames


def align(weights: Tensor, rank: int, num_bases: int, steps: int) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Alternate the two exact steps of min Σ_e ‖W_e − Q_e T_e‖² over QᵀQ = I and T of rank M across the experts.

    (i) T is the best rank-M approximation of the stacked vec(Q_eᵀ W_e); (ii) Q_e = polar(W_e T_eᵀ). Between the first
    and the last alternation T is extrapolated along its last change, by Nesterov's weights, which restart when the
    error rises (O'Donoghue and Candès 2015), and the polar factors are approximate; the last alternation is exact and
    lowers the error. `weights` (E, P, D). Returns codes (E, M), bases (M, R, D), the aligned experts Q_eᵀW_e (E, R, D)
    and the relative error after each step. Beside the weights, memory holds the aligned experts and two banks: frames
    are made and used for a chunk of experts at a time.
    """
    chunks, errors = expert_chunks(weights), list[float]()
    energy = norms(weights).square().sum()
    frames = initial_frames(weights, rank)
    aligned = weights.new_empty(weights.shape[0], rank, weights.shape[2])
    for part in chunks:
        torch.matmul(frames[part].mT, weights[part], out=aligned[part])
    del frames
    earlier: tuple[Tensor, Tensor] | None = None
    num_extrapolated = 0
    while True:
        codes, bases, spectrum = low_rank(aligned, num_bases)
        errors.append(float((1 - spectrum[:num_bases].square().sum() / energy).clamp_min(0).sqrt()))
        if len(errors) == steps:
            return codes, bases, aligned, errors
        last = len(errors) == steps - 1
        num_extrapolated = 0 if last or errors[-1] > min(errors) else num_extrapolated + 1
        weight = (num_extrapolated - 1) / (num_extrapolated + 2) if num_extrapolated else 0.0
        for part in chunks:
            target = mix(codes[part], bases)
            if earlier is not None and weight:
                target.lerp_(mix(earlier[0][part], earlier[1]), -weight)
            product = weights[part] @ target.mT
            frame = polar(product) if last else approximate_polar(product)
            torch.matmul(frame.mT, weights[part], out=aligned[part])
        earlier = codes, bases
        del bases
