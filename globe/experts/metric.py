"""What an error of an expert's matrix does to the output of its layer, and the metric of the fit that follows.

A token x that the router sends to an expert with weight γ adds γ W_downᵀ h to the layer's output, with
h = act(W_gate x, W_up x) and all matrices P x D. An error Δ of W_down moves that by γ Δᵀh, one of W_gate, to first
order, by W_downᵀ (v ⊙ Δx) with v = γ ∂h/∂(W_gate x), and one of W_up likewise. If the P inner units are taken to be
independent of each other and of x, the mean square of that over the tokens is Σ_p s_p ‖Δ_p‖² for the rows Δ_p of Δ,

    s_p = E[γ² h_p²]              for down, and ‖Δ_p‖² as it is
    s_p = E[v_p²] ‖W_down,p‖²     for gate and up, and ‖Δ_p C^{1/2}‖², C = E[x xᵀ], for ‖Δ_p‖²

The rows are the side of the adapters, which can absorb s: the fit is that of S^{1/2} W, and S^{-1/2} is multiplied into
its adapters. C stands on the other side of φ and stays in the objective.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from globe.terms import Family

INPUT_SHRINKAGE = 0.8
"""Share of the identity in C, at equal trace."""
ROW_SHRINKAGE = 0.6
"""Share of their mean in the s of a matrix."""
POWER = 0.35
"""Of what a matrix' share of the importance is raised to for its weight."""
CAP = 3.0
"""The largest weight of a matrix, and the inverse of the smallest."""


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """One layer's experts on a text."""

    num_tokens: int
    """Tokens of the text."""
    inputs: Tensor
    """C, (D, D): mean of x xᵀ over all tokens."""
    counts: Tensor
    """Tokens routed to each expert, (E,)."""
    rows: Mapping[Family, Tensor]
    """s of every family, (E, P), summed over an expert's tokens."""
    inner: Tensor | None = None
    """Sum over an expert's tokens of γ² h hᵀ, (E, P, P): what down is multiplied with; None where nobody asked."""

    @property
    def unreached(self) -> list[int]:
        """Experts that no token was routed to."""
        return [expert for expert, count in enumerate(self.counts.tolist()) if count == 0]


def input_metric(statistics: LayerStatistics) -> Tensor:
    """C (D, D), shrunk towards the identity, with a mean diagonal of 1; the identity for tokens that are all zero."""
    identity = torch.eye(len(statistics.inputs), dtype=statistics.inputs.dtype)
    mean = statistics.inputs.diagonal().mean()
    return identity if mean == 0 else (statistics.inputs / mean).lerp(identity, INPUT_SHRINKAGE)


def row_scales(statistics: LayerStatistics, sigmas: Mapping[Family, float]) -> dict[Family, Tensor]:
    """√s (E, P) for the rows of each family's matrices, which were divided by `sigmas`, 0 for matrices of zeros.

    A matrix's s, to which the mean over the experts is added, are shrunk towards their mean, which is then replaced by
    the weight of the matrix: a power of what its mean is to the mean over the families, capped. That is milder than the
    mean squares ask for: an expert that is hardly used would lose more than it gives. Matrices that no token reaches
    have their family's mean. Where nothing matters, as in a layer that no token reaches or that adds zeros, all rows
    and all matrices matter the same.
    """
    reached = statistics.counts > 0
    size = float(statistics.inputs.diagonal().mean())
    unit = 0.5 ** math.frexp(max(sigmas.values()))[1]  # only ratios count: keep the squares in range
    importance: dict[Family, Tensor] = {
        family: statistics.rows[family].mean(1) * (sigma * unit) ** 2 * (1 if family == "down" else size)
        for family, sigma in sigmas.items()
    }
    for each in importance.values():
        each[~reached] = each[reached].mean() if bool(reached.any()) else 0.0
    mean = torch.cat(list(importance.values())).mean()
    scales: dict[Family, Tensor] = {}
    for family, each in importance.items():
        sums = statistics.rows[family]
        profile = sums + sums.mean(0)
        ones, level = torch.ones_like(profile), profile.mean(1, keepdim=True)
        profile = torch.where(level > 0, profile / level, ones).lerp(ones, ROW_SHRINKAGE)
        weights = (each / mean).pow(POWER).clamp(1 / CAP, CAP) if mean > 0 else torch.ones_like(each)
        scales[family] = (weights[:, None] * profile).sqrt()
    return scales
