"""The start of a fit with a support: a bank of which every expert needs few bases, before any nonlinearity.

The bases of a PCA are used by all experts: cut to a few codes, such a start loses most of what it has. A dictionary
learned for the support does not, and the fit can then leave the supports as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from globe.bank.bases import optimal_directions
from globe.bank.codes import pursue_codes
from globe.bank.factors import mix
from globe.bank.linalg import norms, polar
from globe.bank.objective import expert_chunks

VARIMAX_STEPS = 100


def align_sparse(
    weights: Tensor, codes: Tensor, bases: Tensor, num_kept: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower Σ_e ‖W_e − Q_e Σ_j a_ej B_j‖² over QᵀQ = I, B and codes with `num_kept` non-zeros, by alternation.

    (i) Q_e = polar(W_e T_eᵀ), exact; (ii) codes by hard-thresholding pursuit; (iii) the bank by optimal directions; a
    basis that nobody mixes becomes the expert that is met worst. `weights` (E, P, D), `codes` (E, M), `bases`
    (M, R, D); the dense codes are first turned by varimax, so that few of them are large. Returns codes, bases and the
    aligned experts Q_eᵀW_e (E, R, D).
    """
    rotation, chunks = varimax(codes), expert_chunks(weights)
    codes, bases = codes @ rotation, (rotation.mT @ bases.flatten(1)).view_as(bases)
    aligned = weights.new_empty(weights.shape[0], *bases.shape[1:])
    for _ in range(steps):
        for part in chunks:
            frame = polar(weights[part] @ mix(codes[part], bases).mT)
            torch.matmul(frame.mT, weights[part], out=aligned[part])
        codes = pursue_codes(codes, aligned, bases, num_kept)
        bases, _ = optimal_directions(codes, aligned, lambda_b=1e-6)
        idle = (codes == 0).all(0)
        if bool(idle.any()):
            missed = torch.cat([norms(aligned[part] - mix(codes[part], bases)) for part in chunks])
            bases[idle] = aligned[missed.topk(int(idle.sum())).indices]
    return codes, bases, aligned


def varimax(codes: Tensor) -> Tensor:
    """The rotation (M, M) that makes the squares of codes @ rotation vary most within each column (Kaiser 1958)."""
    rotation = torch.eye(codes.shape[1], dtype=codes.dtype, device=codes.device)
    for _ in range(VARIMAX_STEPS):
        loadings = codes @ rotation
        rotation = polar(codes.mT @ (loadings**3 - loadings * loadings.square().mean(0)))
    return rotation
