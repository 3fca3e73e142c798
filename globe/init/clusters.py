"""Warm starts that choose or average experts: spherical k-means, greedy residual pursuit, and both."""

from __future__ import annotations

import torch
from torch import Tensor

from globe.bank.linalg import norms, solve_positive


def spherical_kmeans(rows: Tensor, num_bases: int, seed: int, max_iterations: int = 50) -> tuple[Tensor, Tensor]:
    """k-means on the unit sphere (Dhillon and Modha 2001) with k-means++ seeding by cosine distance.

    `rows` (E, R, D). Returns the unit centroids (M, R, D) and each expert's cluster (E,). An empty cluster takes, of
    the experts that share a cluster, the one that its centroid serves worst.
    """
    flat = torch.nn.functional.normalize(rows.flatten(1), dim=1)
    similarity_ee = flat @ flat.mT
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(flat), (), generator=generator))]
    while len(chosen) < num_bases:
        distance = (1 - similarity_ee[:, chosen].amax(1)).clamp_min(1e-12).cpu()
        distance[chosen] = 0
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    centroids, cluster = flat[chosen], torch.full((len(flat),), -1, device=flat.device)
    for _ in range(max_iterations):
        similarity, assigned = (flat @ centroids.mT).max(1)
        counts = assigned.bincount(minlength=num_bases)
        for empty in [j for j in range(num_bases) if int(counts[j]) == 0]:
            worst = int(torch.where(counts[assigned] > 1, similarity, torch.inf).argmin())
            counts[assigned[worst]] -= 1
            assigned[worst], counts[empty] = empty, 1
        if bool((assigned == cluster).all()):
            break
        cluster = assigned
        sums = torch.zeros_like(centroids).index_add_(0, cluster, flat)
        centroids = torch.nn.functional.normalize(sums, dim=1)
    return centroids.view(num_bases, *rows.shape[1:]), cluster


def residual_greedy(rows: Tensor, num_bases: int, start: Tensor | None = None) -> Tensor:
    """Pivoted Gram–Schmidt: the next atom is the expert that the atoms so far explain least.

    `rows` (E, R, D); `start` (K, R, D) are atoms to begin from. Returns M unit atoms (M, R, D), `start` included.
    """
    flat = rows.flatten(1)
    atoms = flat[:0] if start is None else start.flatten(1)
    residual = flat
    if len(atoms):
        residual = flat - solve_positive(atoms @ atoms.mT, atoms @ flat.mT, 1e-6)[0].mT @ atoms
    while len(atoms) < num_bases:
        size = norms(residual)
        atom = residual[size.argmax()] / size.max().clamp_min(1e-30)
        residual = residual - (residual @ atom)[:, None] * atom
        atoms = torch.cat([atoms, atom[None]])
    return atoms.view(num_bases, *rows.shape[1:])
