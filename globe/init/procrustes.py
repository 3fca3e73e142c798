"""The aligned warm start: experts are rotated into a common frame before they share a bank.

An expert's intermediate index is arbitrary, so the stacked vec(W_e) of a plain PCA are not comparable. Aligning them is
generalised Procrustes analysis (Gower 1975) with a low-rank mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from globe.bank.factors import mix
from globe.bank.linalg import approximate_polar, eigh, norms, polar, svd
from globe.bank.objective import CHUNK_BYTES, expert_chunks
from globe.init.subspaces import peak_signs


def low_rank(stacked: Tensor, num_bases: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-M approximation of the stacked vectors of (E, R, D), from the E x E Gram matrix.

    Returns orthonormal codes (E, M), bases (M, R, D) in descending order of energy, and the spectrum (E,) of singular
    values, descending.
    """
    flat = stacked.flatten(1)
    codes, spectrum = _leading(flat @ flat.mT, num_bases)
    return codes, (codes.mT @ flat).view(num_bases, *stacked.shape[1:]), spectrum


def _leading(gram: Tensor, num_bases: int) -> tuple[Tensor, Tensor]:
    """The leading M eigenvectors (E, M) of the Gram matrix of vectors, and their singular values, descending."""
    values, vectors = eigh(gram)
    return vectors[:, -num_bases:].flip(1), values.flip(0).clamp_min(0).sqrt()


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
    and the relative error after each step. Beside the weights, memory holds the frames and two banks, in the end the
    aligned experts and one.
    """
    chunks, errors = expert_chunks(weights), list[float]()
    energy = norms(weights).square().sum()
    frames = initial_frames(weights, rank)
    codes, bases, spectrum = _low_rank_of_turned(frames, weights, num_bases)
    errors.append(_missed(spectrum, num_bases, energy))
    earlier: tuple[Tensor, Tensor] | None = None
    num_extrapolated = 0
    frames = frames.contiguous()
    while len(errors) < steps - 1:
        num_extrapolated = 0 if errors[-1] > min(errors) else num_extrapolated + 1
        weight = (num_extrapolated - 1) / (num_extrapolated + 2) if num_extrapolated else 0.0
        for part in chunks:
            target = mix(codes[part], bases)
            if earlier is not None and weight:
                target.lerp_(mix(earlier[0][part], earlier[1]), -weight)
            frames[part] = approximate_polar(weights[part] @ target.mT)
        earlier = codes, bases
        codes, bases, spectrum = _low_rank_of_turned(frames, weights, num_bases)
        errors.append(_missed(spectrum, num_bases, energy))
    if steps == 1:
        return codes, bases, frames.mT @ weights, errors
    del earlier, frames  # make room for the aligned experts
    aligned = weights.new_empty(weights.shape[0], rank, weights.shape[2])
    for part in chunks:
        frame = polar(weights[part] @ mix(codes[part], bases).mT)
        torch.matmul(frame.mT, weights[part], out=aligned[part])
    del bases
    codes, bases, spectrum = low_rank(aligned, num_bases)
    errors.append(_missed(spectrum, num_bases, energy))
    return codes, bases, aligned, errors


def _missed(spectrum: Tensor, num_bases: int, energy: Tensor) -> float:
    return float((1 - spectrum[:num_bases].square().sum() / energy).clamp_min(0).sqrt())


def _low_rank_of_turned(frames: Tensor, weights: Tensor, num_bases: int) -> tuple[Tensor, Tensor, Tensor]:
    """`low_rank` of Q_eᵀW_e, made anew a few columns at a time instead of being kept."""
    num_experts, _, rank = frames.shape
    columns = weights.shape[2]
    width = max(1, columns // 8, CHUNK_BYTES // (num_experts * rank * weights.element_size()))
    parts = [slice(start, start + width) for start in range(0, columns, width)]
    gram, flat = weights.new_zeros(num_experts, num_experts), weights.new_empty(0)
    for part in parts:
        flat = (frames.mT @ weights[:, :, part]).flatten(1)
        gram.addmm_(flat, flat.mT)
    codes, spectrum = _leading(gram, num_bases)
    bases = weights.new_empty(num_bases, rank, columns)
    for part in parts:
        if len(parts) > 1:
            flat = (frames.mT @ weights[:, :, part]).flatten(1)
        bases[:, :, part] = (codes.mT @ flat).view(num_bases, rank, -1)
    return codes, bases, spectrum
