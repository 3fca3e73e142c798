"""Warm starts: where a fit begins, by name."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import torch
from torch import Tensor

from globe.bank.codes import on_simplex, ridge_codes
from globe.bank.factors import mix
from globe.bank.linalg import eigh, norms, solve_positive
from globe.bank.objective import expert_chunks, relative_errors
from globe.errors import SettingsError
from globe.init.clusters import residual_greedy, spherical_kmeans
from globe.init.procrustes import align, low_rank
from globe.init.sparse_start import align_sparse
from globe.init.subspaces import left_gram_rows, right_singular_rows, tangent_rows
from globe.terms import WarmStartName

START_DEVIATION = 0.5
"""Standard deviation of T at the start: small enough for φ to be nearly linear there; measured, see docs/log.md."""


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Codes and bases to begin from, and the targets that they approximate."""

    codes: Tensor
    """a, (E, M)."""
    bases: Tensor
    """B, (M, R, D)."""
    targets: Tensor
    """S_L, (E, R, D): what the mixtures stand for before they were restricted to M bases."""
    metrics: dict[str, float]
    """`target_error`: relative error of the mixtures as an approximation of the targets, and the method's own."""


def warm_start(
    weights: Tensor,
    rank: int,
    num_bases: int,
    method: str = "procrustes",
    *,
    codes: str = "ridge",
    support: int | None = None,
    align_steps: int = 64,
    seed: int = 0,
) -> WarmStart:
    """Codes, bases and targets for `weights` (E, P, D), T scaled to `START_DEVIATION`.

    - `procrustes`: alternate rank-M approximation and Procrustes rotation; `alignment_error`.
    - `svd`: PCA of the experts' leading right singular vectors; `explained`, the energy share of M components.
    - `left_gram_pca`: PCA of U_RᵀW, U_R from the left Gram matrix; `explained`.
    - `ts_pca`: PCA in the tangent space of the Grassmannian at the mean row space; `explained`, `mean_angle` (rad).
    - `spherical_kmeans`: centroids of U_RᵀW on the sphere; `mean_cosine`.
    - `residual_greedy`: experts chosen by what is left of them; `largest_residual`.
    - `hybrid`: half the atoms by k-means, the rest greedily on what those leave; both metrics.

    For signed codes with a `support` the bank is learned for codes with that many non-zeros (`align_sparse`), beginning
    from the method's. For codes on the simplex the atoms are moved to the mixtures of M pivot experts, whose convex
    hull the codes span.
    Raises `SettingsError` for an unknown method.
    """
    if method not in get_args(WarmStartName):
        raise SettingsError(f"warm start {method!r} is unknown; choose one of {', '.join(get_args(WarmStartName))}")
    targets, a, b, metrics = _METHODS[method](weights, rank, num_bases, align_steps, seed)
    if codes == "ridge" and support is not None and support < num_bases:
        a, b, targets = align_sparse(weights, a, b, support, align_steps)
    scale = max(deviation(a, b) / START_DEVIATION, torch.finfo(weights.dtype).tiny)
    b.div_(scale)
    targets.div_(scale)
    if codes != "ridge":
        a, b = to_simplex(a, b)
        if codes == "softmax":  # which is never at the boundary: leave every atom a share
            a = 0.9 * a + 0.1 / num_bases
    missed = sum(float(norms(mix(a[part], b) - targets[part]).square().sum()) for part in expert_chunks(targets))
    metrics["target_error"] = math.sqrt(missed / float(norms(targets).square().sum()))
    return WarmStart(a, b, targets, metrics)


def deviation(codes: Tensor, bases: Tensor) -> float:
    """Standard deviation of the entries of all mixtures T_e, a chunk of experts at a time.

    Of entries that are nearly the same, a thousandth of their root mean square: what is divided by it stays small.
    """
    total = squares = 0.0
    for part in expert_chunks(bases[:1].expand(codes.shape[0], -1, -1)):
        mixed = mix(codes[part], bases)
        total, squares = total + float(mixed.sum()), squares + float(norms(mixed).square().sum())
    count = codes.shape[0] * bases[0].numel()
    return math.sqrt(max(1e-6 * squares, squares - total**2 / count) / max(1, count - 1))


def to_simplex(codes: Tensor, bases: Tensor) -> tuple[Tensor, Tensor]:
    """Change of basis to codes on the simplex: atoms become the mixtures of M pivot experts.

    The pivots are chosen greedily (successive projection, Araújo 2001) on the rows of the codes; every expert's
    coordinates in them are projected to the simplex. codes (E, M) and bases (M, R, D) in and out.
    """
    gram = bases.flatten(1) @ bases.flatten(1).mT
    values, vectors = eigh(gram.cpu().double())
    metric = (vectors * values.clamp_min(0).sqrt()).to(codes)  # rows of codes @ metric have the mixtures' geometry
    residual, pivots = codes @ metric, list[int]()
    for _ in range(codes.shape[1]):
        size = norms(residual)
        size[pivots] = -1
        pivots.append(int(size.argmax()))
        direction = torch.nn.functional.normalize(residual[pivots[-1]], dim=0)
        residual = residual - (residual @ direction)[:, None] * direction
    corners = codes[pivots]
    coordinates = solve_positive(corners @ corners.mT, corners @ codes.mT, 1e-6)[0].mT
    return on_simplex(coordinates, "sparsemax"), mix(corners, bases)


def _from_rows(rows: Tensor, num_bases: int) -> tuple[Tensor, Tensor, Tensor, dict[str, float]]:
    codes, bases, spectrum = low_rank(rows, num_bases)
    explained = spectrum[:num_bases].square().sum() / spectrum.square().sum()
    return rows, codes, bases, {"explained": float(explained)}


def _procrustes(weights: Tensor, rank: int, num_bases: int, align_steps: int, _: int):
    codes, bases, aligned, errors = align(weights, rank, num_bases, align_steps)
    return aligned, codes, bases, {"alignment_error": errors[-1], "alignment_error_start": errors[0]}


def _svd(weights: Tensor, rank: int, num_bases: int, _: int, __: int):
    return _from_rows(right_singular_rows(weights, rank), num_bases)


def _left_gram_pca(weights: Tensor, rank: int, num_bases: int, _: int, __: int):
    return _from_rows(left_gram_rows(weights, rank), num_bases)


def _ts_pca(weights: Tensor, rank: int, num_bases: int, _: int, __: int):
    mean, tangents = tangent_rows(weights, rank)
    rows = mean + tangents
    angle = float(tangents.square().sum((1, 2)).div(rank).sqrt().mean())
    if num_bases == 1:
        codes, bases = torch.ones_like(rows[:, 0, :1]), mean[None]
        explained = 0.0
    else:
        tangent_codes, directions, spectrum = low_rank(tangents, num_bases - 1)
        energy = spectrum.square()
        explained = float(energy[: num_bases - 1].sum() / energy.sum().clamp_min(1e-30))
        codes = torch.cat([torch.ones_like(tangent_codes[:, :1]), tangent_codes], dim=1)
        bases = torch.cat([mean[None], directions])
    return rows, codes, bases, {"explained": explained, "mean_angle": angle}


def _spherical_kmeans(weights: Tensor, rank: int, num_bases: int, _: int, seed: int):
    rows = left_gram_rows(weights, rank)
    centroids, cluster = spherical_kmeans(rows, num_bases, seed)
    flat = torch.nn.functional.normalize(rows.flatten(1), dim=1)
    cosine = float((flat * centroids.flatten(1)[cluster]).sum(1).mean())
    return rows, ridge_codes(rows, centroids), centroids, {"mean_cosine": cosine}


def _residual_greedy(weights: Tensor, rank: int, num_bases: int, _: int, __: int):
    rows = left_gram_rows(weights, rank)
    bases = residual_greedy(rows, num_bases)
    codes = ridge_codes(rows, bases)
    return rows, codes, bases, {"largest_residual": _largest_residual(rows, codes, bases)}


def _hybrid(weights: Tensor, rank: int, num_bases: int, _: int, seed: int):
    rows = left_gram_rows(weights, rank)
    num_centroids = max(1, num_bases // 2)
    centroids, cluster = spherical_kmeans(rows, num_centroids, seed)
    flat = torch.nn.functional.normalize(rows.flatten(1), dim=1)
    cosine = float((flat * centroids.flatten(1)[cluster]).sum(1).mean())
    bases = residual_greedy(rows, num_bases, start=centroids)
    codes = ridge_codes(rows, bases)
    return rows, codes, bases, {"mean_cosine": cosine, "largest_residual": _largest_residual(rows, codes, bases)}


def _largest_residual(rows: Tensor, codes: Tensor, bases: Tensor) -> float:
    return float(relative_errors(rows, mix(codes, bases)).max())


_METHODS = {
    "procrustes": _procrustes,
    "svd": _svd,
    "left_gram_pca": _left_gram_pca,
    "ts_pca": _ts_pca,
    "spherical_kmeans": _spherical_kmeans,
    "residual_greedy": _residual_greedy,
    "hybrid": _hybrid,
}
