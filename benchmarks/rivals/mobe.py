"""MoBE's published loop (Chen et al. 2025, arXiv 2508.05257), written from its description.

    W_e / σ ≈ A_e φ(Σ_j softmax(z_e)_j B_j),    φ = silu or tanh

Every layer and every kind of matrix has its own bank. A, z and B are learnt jointly by Adam at a constant rate of 0.07,
full batch, on the mean squared error, from a warm start: the experts are cut into M groups of neighbours, the SVD of a
group's stacked experts gives its basis V_rᵀ and its experts' adapters U_r S_r, and z is one-hot. The iterate with the
lowest error is kept. Where the publication leaves room, MoBE gets the better of it: the warm start is that of the
normalised weights (the public code takes it from the raw ones and so loses it), the best iterate is looked for more
often, and `best_shape` spends a small budget better than R = P does. `down` enters transposed, as in GloBE, which the
publication leaves alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from benchmarks.stacks import Approximation, Stacks
from globe.errors import SettingsError
from globe.terms import FAMILIES

LEARNING_RATE = 0.07
CHECK_EVERY = 20
"""Epochs between looks at whether the iterate is the best so far."""
OVERSPEND = 1.01
"""A bank may exceed the budget by this much, so that rounding the number of bases down does not cost MoBE."""
ADAPTER_SHARE = 0.6
"""Share of a small budget that goes to the adapters: with it MoBE's error is lowest on the shipped model."""

Activation = Literal["silu", "tanh"]
Shape = tuple[int, int]
"""Rank R and number of bases M."""


def published_shape(num_experts: int, rows: int, columns: int, keep: float) -> Shape | None:
    """R = P and the bases that the budget leaves; None where the adapters alone exceed it."""
    num_bases = _num_bases(num_experts, rows, columns, keep, rows)
    return (rows, num_bases) if num_bases else None


def best_shape(num_experts: int, rows: int, columns: int, keep: float) -> Shape:
    """R = P while the adapters then take at most three fifths of the budget, else the rank that gives them that.

    Raises `SettingsError` when no bank fits.
    """
    for rank in range(min(rows, max(1, round(ADAPTER_SHARE * keep * columns))), 0, -1):
        if num_bases := _num_bases(num_experts, rows, columns, keep, rank):
            return rank, num_bases
    raise SettingsError(f"keep {keep:g} leaves no basis for {num_experts} experts of {rows} x {columns}")


def _num_bases(num_experts: int, rows: int, columns: int, keep: float, rank: int) -> int:
    spare = OVERSPEND * keep * num_experts * rows * columns - num_experts * rows * rank
    return max(0, min(num_experts, int(spare / (rank * columns + num_experts))))


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What Adam moves, for N banks of the same shape side by side."""

    adapters: Tensor
    """A, (N, E, P, R)."""
    logits: Tensor
    """z, (N, E, M)."""
    bases: Tensor
    """B, (N, M, R, D)."""

    @property
    def tensors(self) -> list[Tensor]:
        return [self.adapters, self.logits, self.bases]


def warm_start(experts: Tensor, rank: int, num_bases: int) -> Parameters:
    """Group-wise SVD of experts (N, E, P, D): neighbours in M groups of nearly equal size, logits one-hot."""
    num_banks, num_experts, rows, columns = experts.shape
    adapters = experts.new_zeros(num_banks, num_experts, rows, rank)
    logits = experts.new_zeros(num_banks, num_experts, num_bases)
    bases = experts.new_zeros(num_banks, num_bases, rank, columns)
    bounds = [round(group * num_experts / num_bases) for group in range(num_bases + 1)]
    for group, (start, stop) in enumerate(pairwise(bounds)):
        u, s, vh = torch.linalg.svd(experts[:, start:stop].flatten(1, 2), full_matrices=False)
        adapters[:, start:stop] = (u[:, :, :rank] * s[:, None, :rank]).unflatten(1, (stop - start, rows))
        logits[:, start:stop, group] = 1
        bases[:, group] = vh[:, :rank]
    return Parameters(adapters, logits, bases)


def features_and_slope(mixed: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """φ and φ' at `mixed`."""
    if activation == "tanh":
        features = mixed.tanh()
        return features, torch.addcmul(torch.ones_like(features), features, features, value=-1)
    gate = mixed.sigmoid()
    features = gate * mixed
    return features, torch.addcmul(gate, features, 1 - gate)  # s + silu·(1 − s)


def rebuild(adapters: Tensor, codes: Tensor, bases: Tensor, activation: Activation = "silu") -> Tensor:
    """A_e φ(Σ_j a_ej B_j), (N, E, P, D), for codes a on the simplex."""
    mixed = (codes @ bases.flatten(2)).unflatten(2, bases.shape[2:])
    return adapters @ features_and_slope(mixed, activation)[0]


class Loss:
    """The mean squared error of each bank, and its gradient written out, which saves a fifth of autograd's time."""

    def __init__(self, experts: Tensor, activation: Activation = "silu") -> None:
        self._experts, self._activation = experts.flatten(0, 1), activation
        self._num_banks, self._size = experts.shape[0], experts[0].numel()
        self._residual = torch.empty_like(self._experts)

    def __call__(self, now: Parameters, gradient: Parameters) -> Tensor:
        """Write the gradient into `gradient` and return the losses (N,)."""
        codes = now.logits.softmax(-1)
        mixed = (codes @ now.bases.flatten(2)).view(-1, *now.bases.shape[2:])
        features, slope = features_and_slope(mixed, self._activation)
        adapters = now.adapters.flatten(0, 1)
        residual = torch.baddbmm(self._experts, adapters, features, beta=-1, out=self._residual)
        loss = residual.view(self._num_banks, -1).square().sum(1) / self._size
        torch.baddbmm(
            gradient.adapters.flatten(0, 1),
            residual,
            features.mT,
            beta=0,
            alpha=2 / self._size,
            out=gradient.adapters.flatten(0, 1),
        )
        grad_mixed = (adapters.mT @ residual).mul_(slope).mul_(2 / self._size).view(*codes.shape[:2], -1)
        torch.bmm(codes.mT, grad_mixed, out=gradient.bases.flatten(2))
        grad_codes = grad_mixed @ now.bases.flatten(2).mT
        gradient.logits.copy_(codes * (grad_codes - (codes * grad_codes).sum(-1, keepdim=True)))
        return loss


@torch.no_grad()
def train(
    experts: Tensor,
    start: Parameters,
    epochs: int,
    on_epoch: Callable[[int, Tensor], None] | None = None,
    activation: Activation = "silu",
) -> Parameters:
    """Adam for `epochs` full-batch steps on normalised experts (N, E, P, D); the best iterate of each bank.

    `on_epoch` sees the number of steps taken and the loss (N,) at that point. `start` is moved in place.
    """
    gradient = Parameters(*(torch.zeros_like(tensor) for tensor in start.tensors))
    for tensor, slot in zip(start.tensors, gradient.tensors, strict=True):
        tensor.grad = slot
    optimiser = torch.optim.Adam(start.tensors, lr=LEARNING_RATE, fused=True)
    best = Parameters(*(tensor.clone() for tensor in start.tensors))
    loss, lowest = Loss(experts, activation), torch.full_like(experts[:, 0, 0, 0], torch.inf)
    for epoch in range(epochs + 1):
        losses = loss(start, gradient)
        if on_epoch is not None:
            on_epoch(epoch, losses)
        if epoch % CHECK_EVERY == 0 or epoch == epochs:
            better = losses < lowest
            lowest[better] = losses[better]
            for kept, tensor in zip(best.tensors, start.tensors, strict=True):
                kept[better] = tensor[better]
        if epoch < epochs:
            optimiser.step()
    return best


def mobe(
    stacks: Stacks,
    shape: Shape,
    epochs: int,
    dtype: torch.dtype,
    on_layer: Callable[[int], None] | None = None,
    activation: Activation = "silu",
) -> Approximation:
    """Fit every layer and family with a bank of its own of `shape`, stored in `dtype`.

    The three families of a layer are trained side by side, which changes no arithmetic and saves time. `on_layer` sees
    the layer that was finished.
    """
    began, approximation, stored = time.monotonic(), {}, 0
    for layer in sorted({layer for layer, _ in stacks}):
        experts = torch.stack([stacks[layer, family] for family in FAMILIES])
        sigma = experts.std(dim=(1, 2, 3), correction=0, keepdim=True)
        fitted = train(experts / sigma, warm_start(experts / sigma, *shape), epochs, activation=activation)
        factors = [fitted.adapters * sigma, fitted.logits.softmax(-1), fitted.bases]
        rebuilt = rebuild(*(factor.to(dtype).float() for factor in factors), activation=activation)
        approximation |= {(layer, family): rebuilt[place] for place, family in enumerate(FAMILIES)}
        stored += sum(factor.numel() for factor in factors)
        if on_layer is not None:
            on_layer(layer)
    return Approximation(approximation, stored, f"R={shape[0]} M={shape[1]}", time.monotonic() - began)
