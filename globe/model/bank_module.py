"""The module that owns a bank and composes expert matrices from it."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from globe.bank.activations import activate
from globe.bank.factors import mix

WORKING_BYTES = 256 * 2**20
"""Bounds each of the two large things in memory while experts run: the composed matrices of the experts at work, and
what composing a slice of their columns takes. One expert and one column are the least, whatever they take."""


class Bank(nn.Module):
    """Bases (M, R, D) shared by experts.

    Experts call the bank, they do not read `bases`: what moves weights about (offloading to disk, several devices) does
    so around a module's call.
    """

    _is_hf_initialized = True  # keeps transformers from initialising it

    def __init__(
        self,
        shape: tuple[int, int, int],
        activation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_bases, self.rank, self.hidden_size = shape
        self.activation = activation
        self.bases = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

    def forward(self, adapters: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What_e = A_e φ(Σ_j a_ej B_j) in `dtype`, (E, P, D), from adapters (E, P, R) and codes (E, M).

        Composed in float32 (float64 factors in float64) and rounded once, a slice of columns at a time, so that neither
        a float32 copy of the bank nor the mixtures of all experts exist at once; in training neither is kept for the
        backward pass.
        """
        parts = self._columns(4 * (self.num_bases * self.rank + adapters.shape[0] * (self.rank + adapters.shape[1])))
        run = self._compose_columns
        if len(parts) > 1 and torch.is_grad_enabled():
            run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        with torch.autocast(adapters.device.type, enabled=False):
            slices = [run(adapters, codes, self.bases, part, dtype) for part in parts]
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim=2)

    def _compose_columns(
        self, adapters: Tensor, codes: Tensor, bases: Tensor, part: slice, dtype: torch.dtype
    ) -> Tensor:
        exact = torch.promote_types(adapters.dtype, torch.float32)
        bases = bases[:, :, part]
        if len(codes) == 1:  # alone, a row would be multiplied, and rounded, in another way than among others
            codes = codes.expand(2, -1)
        mixed = mix(codes.to(exact), bases.to(exact))[: len(adapters)]
        return (adapters.to(exact) @ activate(mixed, self.activation)).to(dtype)

    def products(self, states: Tensor) -> Tensor:
        """B_j x for every basis and state: (T, D) -> (T, M, R)."""
        return (states @ self.bases.flatten(0, 1).T).unflatten(1, (self.num_bases, self.rank))

    def transposed_sum(self, states: Tensor) -> Tensor:
        """Σ_j B_jᵀ v_j: (T, M, R) -> (T, D)."""
        return states.flatten(1) @ self.bases.flatten(0, 1)

    def _columns(self, bytes_per_column: int) -> list[slice]:
        """The columns in slices that fit `WORKING_BYTES`."""
        width = max(1, WORKING_BYTES // bytes_per_column)
        return [slice(start, start + width) for start in range(0, self.hidden_size, width)]


@dataclasses.dataclass(frozen=True)
class BankUse:
    """A bank and the families of one layer that it serves."""

    bank: Bank
    families: tuple[str, ...]
    own: str | None
    """The bank's name if it belongs to this layer alone; `None` if the base model owns it."""
