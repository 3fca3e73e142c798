"""What calibrated methods know about a model: one pass over a text, with a hook on every layer's experts.

    C = mean over all tokens of x xᵀ                  what gate and up multiply
    C_e = mean over the expert's tokens of h hᵀ       what down multiplies: the expert's own inner activation
    S_e = mean over the expert's tokens of g ‖f_e(x)‖  gate times norm of the output

x are the layer's tokens, h = act(gate x) ⊙ up x, g the router's weight of the expert among the chosen ones.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from globe.measure.calibrate import run_hooked
from globe.model.expert_modules import RoutedExperts, find_experts
from globe.model.expert_run import run_expert
from globe.terms import Family

CALIBRATION = str(Path(__file__).parent / "python_library.txt")
"""What everything is calibrated on: files of the Python standard library that the shipped model was not trained on, nor
is judged on (`scripts/train_shipped_model.py`)."""
DAMPING = 1.0
"""Share of its mean diagonal that is added to a second moment before it is factorised.

Chosen by `benchmarks.rival_settings`, as GPTQ's own was.
"""


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """One layer's experts on the calibration text."""

    inputs: Tensor
    """C, (D, D)."""
    inner: Tensor
    """C_e, (E, P, P); the layer's mean counts as P tokens of every expert, and so is all of one that got none."""
    counts: Tensor
    """Tokens routed to each expert, (E,)."""
    saliency: Tensor
    """S_e, (E,); 0 for an expert that got no token."""
    output_similarity: Tensor
    """Cosines (E, E) between the experts' outputs to all tokens, weighted by the router's softmax over all experts."""
    logit_similarity: Tensor
    """Cosines (E, E) between the experts' router logits."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Statistics of the layers, and what they cost."""

    layers: Mapping[int, LayerStatistics]
    num_tokens: int
    seconds: float

    def moment(self, layer: int, family: Family) -> Tensor:
        """Second moment of what the matrices multiply: (1, D, D) for gate and up, (E, P, P) for down."""
        statistics = self.layers[layer]
        return statistics.inner if family == "down" else statistics.inputs[None]


def damped(moment: Tensor, share: float | None = None) -> Tensor:
    """C + share · mean(diag C) · I, for C (..., N, N); by default DAMPING is the share."""
    share = DAMPING if share is None else share
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    return moment + torch.diag_embed(share * diagonal.mean(-1, keepdim=True).expand_as(diagonal))


class _Sums:
    """Sums over the tokens of one layer."""

    def __init__(self, experts: RoutedExperts, router: Any) -> None:
        self._experts, self._router = experts, router
        num_experts, inner, hidden = (
            experts.layout.num_experts,
            experts.layout.intermediate_size,
            experts.layout.hidden_size,
        )
        zeros = router.weight.new_zeros
        self._num_tokens = 0
        self._inputs, self._inner = zeros(hidden, hidden), zeros(num_experts, inner, inner)
        self._counts, self._norms = zeros(num_experts), zeros(num_experts)
        self._outputs, self._logits = zeros(num_experts, num_experts), zeros(num_experts, num_experts)

    def __call__(self, _: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add tokens x (T, D), the experts chosen for each (T, K) and their weights (T, K)."""
        x, chosen, weights = arguments
        self._num_tokens += x.shape[0]
        self._inputs += x.mT @ x
        logits = functional.linear(x, self._router.weight)
        self._logits += logits.mT @ logits
        gates, outputs = logits.softmax(-1), []
        for expert in range(len(self._counts)):
            found = run_expert(self._experts, expert, x)
            h, output = found.activations, found.outputs
            token, place = torch.where(chosen == expert)
            self._counts[expert] += len(token)
            self._norms[expert] += weights[token, place] @ output[token].norm(dim=1)
            self._inner[expert] += h[token].mT @ h[token]
            outputs.append((gates[:, expert, None] * output).flatten())
        stacked = torch.stack(outputs)
        self._outputs += stacked @ stacked.mT

    def means(self) -> LayerStatistics:
        prior = self._inner.sum(0) / self._counts.sum()
        strength = prior.shape[0]
        return LayerStatistics(
            inputs=self._inputs / self._num_tokens,
            inner=(self._inner + strength * prior) / (self._counts + strength)[:, None, None],
            counts=self._counts,
            saliency=self._norms / self._counts.clamp_min(1),
            output_similarity=_cosines(self._outputs),
            logit_similarity=_cosines(self._logits),
        )


def _cosines(gram: Tensor) -> Tensor:
    norms = gram.diagonal().sqrt()
    return gram / torch.outer(norms, norms).clamp_min(torch.finfo(gram.dtype).tiny)


@torch.no_grad()
def calibrate(model: Any, windows: Tensor, layers: Collection[int], batch: int = 8) -> Calibration:
    """Run `model` over token windows (N, length) and collect the statistics of `layers`.

    The router is found as in `benchmarks.stacks.remove_experts`. Every expert sees every token, for the similarities.
    """
    began, sums = time.monotonic(), dict[int, _Sums]()
    for found in find_experts(model):
        if found.layer in layers:
            router = model.get_submodule(f"{found.path.rpartition('.')[0]}.gate")
            sums[found.layer] = _Sums(found, router)
    run_hooked(model, windows, sums, batch)
    statistics = {layer: total.means() for layer, total in sums.items()}
    return Calibration(statistics, windows.numel(), time.monotonic() - began)
