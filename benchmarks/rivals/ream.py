"""REAM: experts are merged instead of pruned (Jha et al. 2026, arXiv 2604.04356).

    W_group = Σ_e S_e Π_e W_e / Σ_e S_e over the experts e of a group

The centroids are the experts that REAP would keep. From the most salient one down, each takes the experts most similar
to it among those left, up to 16, so that most groups are of one expert alone. Similarity is the mean of two cosines: of
the experts' outputs weighted by the router's softmax, and of their router logits. Π_e aligns an expert's inner index to
its centroid's by linear assignment, on activations (what gate and up make of the calibration inputs) and on weights
together. The centroid's row of the router stays, the others are removed. The paper merges layer after layer and
measures each on the layers merged before it; here, as for every other method, one pass over the original model has to
do.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from benchmarks.calibration import Calibration, LayerStatistics
from benchmarks.rivals.assignment import assign
from benchmarks.rivals.reap import kept_experts, kept_shape
from benchmarks.stacks import Approximation, Stacks
from globe.terms import FAMILIES, Family

GROUP_SIZE = 16
"""Experts that a centroid takes at most, unless so few centroids are left that it has to be more."""


def group(statistics: LayerStatistics, centroids: Tensor) -> dict[int, list[int]]:
    """The experts that each centroid takes, without itself."""
    num_experts = len(statistics.saliency)
    similarity = (statistics.output_similarity + statistics.logit_similarity) / 2
    ranked = sorted(centroids.tolist(), key=lambda expert: float(statistics.saliency[expert]), reverse=True)
    left = set(range(num_experts)) - set(ranked)
    room = max(GROUP_SIZE, math.ceil(len(left) / len(ranked)))
    groups: dict[int, list[int]] = {}
    for centroid in ranked:
        groups[centroid] = sorted(left, key=lambda expert: float(similarity[centroid, expert]), reverse=True)[:room]
        left -= set(groups[centroid])
    return groups


def align(centroid: dict[Family, Tensor], member: dict[Family, Tensor], inputs: Tensor) -> Tensor:
    """For each inner index of the centroid the member's that fits it, (P,), given families (P, D) and C (D, D)."""
    gains = [centroid[family] @ member[family].mT / _norms(centroid[family], member[family]) for family in FAMILIES]
    root = torch.linalg.cholesky(inputs + 1e-6 * inputs.diagonal().mean() * torch.eye(len(inputs)))
    for family in ("gate", "up"):
        one, other = centroid[family] @ root, member[family] @ root
        gains.append(one @ other.mT / _norms(one, other))
    return torch.from_numpy(assign(-torch.stack(gains).sum(0).double().numpy()))


def _norms(one: Tensor, other: Tensor) -> Tensor:
    return one.norm() * other.norm()


def ream(stacks: Stacks, keep: float, dtype: torch.dtype, calibration: Calibration) -> Approximation:
    """Merge into at most `keep` of the experts, stored in `dtype`; What is the group's, in each expert's own order."""
    began, stored, kept = time.monotonic(), 0, kept_experts(calibration, keep)
    approximation = {key: experts.clone() for key, experts in stacks.items()}
    for layer, centroids in kept.items():
        statistics = calibration.layers[layer]
        for centroid, members in group(statistics, centroids).items():
            families = [{family: stacks[layer, family][e] for family in FAMILIES} for e in (centroid, *members)]
            orders = [align(families[0], member, statistics.inputs) for member in families]
            weights = statistics.saliency[[centroid, *members]] + torch.finfo(torch.float32).tiny
            for family in FAMILIES:
                aligned = torch.stack([each[family][order] for each, order in zip(families, orders, strict=True)])
                merged = torch.tensordot(weights / weights.sum(), aligned, 1).to(dtype).float()
                stored += merged.numel()
                for expert, order in zip((centroid, *members), orders, strict=True):
                    approximation[layer, family][expert, order] = merged
    return Approximation(approximation, stored, kept_shape(kept), time.monotonic() - began, kept_experts=kept)
