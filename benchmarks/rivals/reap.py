"""REAP: experts that say little are removed (Lasby et al. 2025, arXiv 2510.13999, the saliency criterion S_j).

    S_j = mean over the tokens routed to j of g_j(x) ‖f_j(x)‖₂

g is the router's weight, renormalised over the chosen experts where the model does so. The experts with the lowest S_j
are removed with their rows of the router, and the router chooses among those that are left.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.calibration import Calibration
from benchmarks.stacks import Approximation, Stacks
from globe.errors import SettingsError


def kept_experts(calibration: Calibration, keep: float) -> dict[int, Tensor]:
    """The most salient experts of each layer, ascending: at most `keep` of all experts, spread evenly.

    The published method keeps the same number everywhere, which would waste the fraction of an expert that the budget
    leaves in each layer: it is put together for layers whose next expert has the largest share of the layer's saliency.
    Raises `SettingsError` when a layer would keep none.
    """
    saliency = {layer: statistics.saliency for layer, statistics in calibration.layers.items()}
    num_experts = len(next(iter(saliency.values())))
    everywhere = int(keep * num_experts)
    if everywhere < 1:
        raise SettingsError(f"keep {keep:g} leaves none of {num_experts} experts")
    spare = int(keep * num_experts * len(saliency) + 1e-9) - everywhere * len(saliency)
    order = {layer: scores.argsort(descending=True) for layer, scores in saliency.items()}

    def share_of_next(layer: int) -> float:
        return float(saliency[layer][order[layer][everywhere]] / saliency[layer].sum())

    generous = set(sorted(saliency, key=share_of_next, reverse=True)[:spare]) if spare else set[int]()
    return {layer: ranked[: everywhere + (layer in generous)].sort().values for layer, ranked in order.items()}


def kept_shape(kept: dict[int, Tensor]) -> str:
    """Experts left in a layer, in words."""
    numbers = sorted({len(experts) for experts in kept.values()})
    return f"E={'-'.join(map(str, numbers))}"


def reap(stacks: Stacks, keep: float, dtype: torch.dtype, calibration: Calibration) -> Approximation:
    """Keep at most `keep` of the experts, untouched, in the precision `dtype` that they have; the others become 0."""
    began, approximation, stored = time.monotonic(), {}, 0
    kept = kept_experts(calibration, keep)
    for (layer, family), experts in stacks.items():
        left = kept[layer]
        approximation[layer, family] = torch.zeros_like(experts)
        approximation[layer, family][left] = experts[left].to(dtype).float()
        stored += experts[left].numel()
    seconds = time.monotonic() - began
    return Approximation(approximation, stored, kept_shape(kept), seconds, kept_experts=kept)
