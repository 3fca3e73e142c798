"""TD-MoE's whitened Tucker decomposition (Xu et al. 2026, ICLR, "TD-MoE: Tensor Decomposition for MoE Models", eq. 4).

    T (E, P, D) = the experts of one layer and family,   T_w = T whitened on the inputs' side
    T_w ≈ G ×₁ U₁ ×₂ U₂ ×₃ U₃,   r₁r₂r₃ + E r₁ + P r₂ + D r₃ parameters, whitening undone in its side's factor

The ranks are those, among all that the budget allows, that keep most of the energy of the higher-order SVD's core: r₃
follows from r₁ and r₂, as in the paper's rank allocation. A mode of full rank needs no factor, which is to TD-MoE's
gain. The factors are then improved by alternating least squares (HOOI, De Lathauwer et al. 2000). The paper whitens the
outputs' side too, by gradients; without them the side of the inputs alone stands for the loss. A mode has one whitening
for all experts: for `down` that is the mean of the experts' inner second moments, weighted by their tokens.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.calibration import Calibration, damped
from benchmarks.stacks import Approximation, Stacks
from globe.errors import SettingsError

SWEEPS = 4
"""Rounds of alternating least squares."""

Ranks = tuple[int, int, int]


def stored_parameters(shape: Ranks, ranks: Ranks) -> int:
    """Of the core and of the factors of those modes that are not of full rank."""
    factors = sum(size * rank for size, rank in zip(shape, ranks, strict=True) if rank < size)
    return ranks[0] * ranks[1] * ranks[2] + factors


def project(tensor: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """T ×₁ U₁ᵀ ×₂ U₂ᵀ ×₃ U₃ᵀ."""
    return torch.einsum("epd,ea,pb,dc->abc", tensor, *factors)


def leading_vectors(tensor: Tensor, mode: int) -> Tensor:
    """Left singular vectors of the unfolding along `mode`, the largest first."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    return torch.linalg.eigh(unfolded @ unfolded.mT)[1].flip(1)


def best_ranks(core: Tensor, budget: int) -> Ranks:
    """The ranks within `budget` parameters that keep most of the full core's energy.

    Raises `SettingsError` when not even ranks of 1 fit.
    """
    E, P, D = core.shape
    energy = core.double().square().cumsum(0).cumsum(1).cumsum(2)
    best, kept = None, -1.0
    for r1 in range(1, E + 1):
        for r2 in range(1, P + 1):
            spare = budget - stored_parameters((E, P, D), (r1, r2, 0))
            r3 = D if spare >= r1 * r2 * D else min(D - 1, spare // (r1 * r2 + D))
            if r3 >= 1 and float(energy[r1 - 1, r2 - 1, r3 - 1]) > kept:
                best, kept = (r1, r2, r3), float(energy[r1 - 1, r2 - 1, r3 - 1])
    if best is None:
        raise SettingsError(f"{budget} parameters leave no Tucker ranks for {E} experts of {P} x {D}")
    return best


def tucker(tensor: Tensor, budget: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Core (r₁, r₂, r₃) and orthonormal factors (E, r₁), (P, r₂), (D, r₃) within `budget` stored parameters."""
    full = [leading_vectors(tensor, mode) for mode in range(3)]
    ranks = best_ranks(project(tensor, (full[0], full[1], full[2])), budget)
    factors = [vectors[:, :rank] for vectors, rank in zip(full, ranks, strict=True)]
    for _ in range(SWEEPS):
        for mode in range(3):
            others = [torch.eye(size) if place == mode else factors[place] for place, size in enumerate(tensor.shape)]
            partial = project(tensor, (others[0], others[1], others[2]))
            factors[mode] = leading_vectors(partial, mode)[:, : ranks[mode]]
    found = factors[0], factors[1], factors[2]
    return project(tensor, found), found


def td_moe(stacks: Stacks, keep: float, dtype: torch.dtype, calibration: Calibration) -> Approximation:
    """Store at most `keep` of the parameters of every layer and family, in `dtype`."""
    began, approximation, stored, ranks = time.monotonic(), {}, 0, []
    for (layer, family), experts in stacks.items():
        moment, counts = calibration.moment(layer, family), calibration.layers[layer].counts
        if family == "down":
            root = torch.linalg.cholesky(damped((moment * (counts / counts.sum())[:, None, None]).sum(0)))
            core, (u1, u2, u3) = tucker(root.mT @ experts, int(keep * experts.numel()))
            u2 = torch.linalg.solve_triangular(root.mT, u2, upper=True)
        else:
            root = torch.linalg.cholesky(damped(moment[0]))
            core, (u1, u2, u3) = tucker(experts @ root, int(keep * experts.numel()))
            u3 = torch.linalg.solve_triangular(root.mT, u3, upper=True)
        found = core.shape[0], core.shape[1], core.shape[2]
        stored += stored_parameters((experts.shape[0], experts.shape[1], experts.shape[2]), found)
        ranks.append(found)
        if found[0] == len(experts):  # a factor that is not stored goes into the core
            core, u1 = torch.einsum("abc,ea->ebc", core, u1), torch.eye(len(experts))
        if found[1] == experts.shape[1]:
            core, u2 = torch.einsum("abc,pb->apc", core, u2), torch.eye(experts.shape[1])
        if found[2] == experts.shape[2]:
            core, u3 = torch.einsum("abc,dc->abd", core, u3), torch.eye(experts.shape[2])
        factors = [factor.to(dtype).float() for factor in (core, u1, u2, u3)]
        approximation[layer, family] = torch.einsum("abc,ea,pb,dc->epd", *factors)
    shape = "r=" + " x ".join(_spread([found[mode] for found in ranks]) for mode in range(3))
    return Approximation(approximation, stored, shape, time.monotonic() - began)


def _spread(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"
