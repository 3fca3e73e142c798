"""The module that owns a bank and composes expert matrices from it."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from globe.bank.activations import activate
from globe.bank.factors import mix
from globe.bank.precision import Precision
from globe.bank.rounding import decode, stored_shape

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
        precision: Precision = Precision(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.num_bases, self.rank, self.hidden_size = num_bases, rank, hidden_size
        self.activation, self.precision = activation, precision
        self.bases = factor_parameter((num_bases, rank, hidden_size), precision.bases, dtype, device)

    def forward(self, adapters: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """What_e = A_e φ(Σ_j a_ej B_j) in `dtype`, (E, P, D), from adapters (E, P, R) and codes (E, M) as stored.

        Composed in float32 (float64 factors in float64) and rounded once, a slice of columns at a time, so that neither
        a float32 copy of the bank nor the mixtures of all experts exist at once; in training neither is kept for the
        backward pass.
        """
        adapters, codes = self.plain_adapters(adapters), self.plain_codes(codes)
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
        bases = self._plain_bases(bases, part)
        if len(codes) == 1:  # alone, a row would be multiplied, and rounded, in another way than among others
            codes = codes.expand(2, -1)
        mixed = mix(codes.to(exact), bases.to(exact))[: len(adapters)]
        return (adapters.to(exact) @ activate(mixed, self.activation)).to(dtype)

    def products(self, states: Tensor) -> Tensor:
        """B_j x for every basis and state: (T, D) -> (T, M, R)."""
        if self.precision.bases is None:
            return (states @ self.bases.flatten(0, 1).T).unflatten(1, (self.num_bases, self.rank))
        exact = torch.promote_types(states.dtype, torch.float32)
        total = states.new_zeros((len(states), self.num_bases * self.rank), dtype=exact)
        for part in self._columns(4 * self.num_bases * self.rank):
            total += states[:, part].to(exact) @ self._plain_bases(self.bases, part).flatten(0, 1).T.to(exact)
        return total.unflatten(1, (self.num_bases, self.rank)).to(states.dtype)

    def transposed_sum(self, states: Tensor) -> Tensor:
        """Σ_j B_jᵀ v_j: (T, M, R) -> (T, D)."""
        states = states.flatten(1)
        if self.precision.bases is None:
            return states @ self.bases.flatten(0, 1)
        exact = states.to(torch.promote_types(states.dtype, torch.float32))
        parts = self._columns(4 * self.num_bases * self.rank)
        slices = [exact @ self._plain_bases(self.bases, part).flatten(0, 1).to(exact) for part in parts]
        return torch.cat(slices, dim=1).to(states.dtype)

    def plain_adapters(self, adapters: Tensor) -> Tensor:
        """Adapters (…, R) from adapters as stored."""
        bits = self.precision.adapters
        return adapters if bits is None else decode(adapters, self.rank, bits)

    def plain_codes(self, codes: Tensor) -> Tensor:
        """Codes (…, M) from codes as stored."""
        bits = self.precision.codes
        return codes if bits is None else decode(codes, self.num_bases, bits)

    def _plain_bases(self, bases: Tensor, part: slice) -> Tensor:
        bits = self.precision.bases
        return bases[:, :, part] if bits is None else decode(bases, self.hidden_size, bits, part)

    def _columns(self, bytes_per_column: int) -> list[slice]:
        """The columns in slices that fit `WORKING_BYTES`."""
        width = max(1, WORKING_BYTES // bytes_per_column)
        if self.precision.bases is not None:
            width = max(8, width // 8 * 8)  # where packed rows can be cut
        return [slice(start, start + width) for start in range(0, self.hidden_size, width)]


@dataclasses.dataclass(frozen=True)
class BankUse:
    """A bank and the families of one layer that it serves."""

    bank: Bank
    families: tuple[str, ...]
    own: str | None
    """The bank's name if it belongs to this layer alone; `None` if the base model owns it."""


def factor_parameter(
    shape: tuple[int, ...], bits: int | None, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    """An empty parameter for a factor of `shape`: in `dtype`, or encoded in `bits` and then not trainable."""
    if bits is None:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
    empty = torch.empty(stored_shape(shape, bits), dtype=torch.uint8, device=device)
    return nn.Parameter(empty, requires_grad=False)
