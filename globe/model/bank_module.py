"""The module that owns a bank and composes expert matrices from it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from globe.bank.factors import compose

WORKING_BYTES = 256 * 2**20
"""Bounds each of the two large things in memory while experts run: the composed matrices of the experts at work, and
what composing a slice of their columns takes. One expert and one column are the least, whatever they take."""


class Bank(nn.Module):
    """Bases shared by experts.

    Experts call the bank, they do not read `bases`: what moves weights about (offloading to disk, several devices) does
    so around a module's call.
    """

    _is_hf_initialized = True  # keeps transformers from initialising it

    def __init__(
        self,
        num_bases: int,
        rank: int,
        hidden_size: int,
        activation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.bases = nn.Parameter(torch.empty(num_bases, rank, hidden_size, dtype=dtype, device=device))
        self.activation = activation

    def forward(self, adapters: Tensor, codes: Tensor) -> Tensor:
        """What_e = A_e φ(Σ_j a_ej B_j): (E, P, R), (E, M) -> (E, P, D), in the adapters' dtype.

        Composed in float32 (float64 factors in float64) and rounded once, a slice of columns at a time, so that neither
        a float32 copy of the bank nor the mixtures of all experts exist at once; in training neither is kept for the
        backward pass.
        """
        num_bases, rank, hidden_size = self.bases.shape
        per_column = 4 * (num_bases * rank + adapters.shape[0] * (rank + adapters.shape[1]))
        width = min(hidden_size, max(1, WORKING_BYTES // per_column))
        run = _compose_columns
        if width < hidden_size and torch.is_grad_enabled():
            run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        with torch.autocast(adapters.device.type, enabled=False):
            slices = [run(adapters, codes, bases, self.activation) for bases in self.bases.split(width, dim=2)]
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim=2)


def _compose_columns(adapters: Tensor, codes: Tensor, bases: Tensor, activation: str) -> Tensor:
    exact = torch.promote_types(adapters.dtype, torch.float32)
    return compose(adapters.to(exact), codes.to(exact), bases.to(exact), activation).to(adapters.dtype)
