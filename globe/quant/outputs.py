"""What is done to the outputs of experts before their rows are coded, and undone after.

    X' = X D_e H

**Scales** D_e, diagonal: a row's error is spread evenly over its outputs, whatever they are worth. With d the scale of
an output, its error costs w / d², and the row's energy, in proportion to which it has errors, is that of d x; of all
scales d² = √w / rms(x) has the least cost, (mean √w rms(x))² for mean w · mean x² without, by Cauchy's inequality. They
are powers of √2, a byte for each output of each expert, stored where they save more bits than they take.

**Rotation** H, orthogonal, the same for all: signs, then Hadamard matrices of the largest power of two that divides the
outputs, on blocks next to each other, and across the blocks the reflection at their mean, which mixes three well. Rows
whose entries are sums of many are nearer to normal, for which a trellis is made, than trained ones, which have outliers
(QuIP#, Tseng et al. 2024, arXiv 2402.04396). Sums, differences and products of float32 in a fixed order: the same bits
on every machine.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from globe.quant import trellis
from globe.quant.scales import PER_OCTAVE, scales
from globe.quant.threads import run_all

STEP = PER_OCTAVE // 2
"""Of a scale: half an octave, in the unit of `globe.quant.scales`."""
MOST_STEPS = 40
"""Of a scale, either way: a factor of a million."""
WORTH = 2.0
"""Bits that scales must save over those that they take: what they save is estimated."""
_LEAST_PER_THREAD = 2**16
"""Entries that a thread mixes at least: a fraction of a millisecond."""
_HASH = 2654435761
"""Knuth's multiplicative hash: output k has the sign of the highest bit of _HASH·(k + 1) mod 2³²."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Rotated, and scaled before that where it pays."""

    exponents: Tensor | None = None
    """Scale exponents (E, K) int8, in steps of half an octave."""

    @property
    def num_bytes(self) -> int:
        """Stored."""
        return 0 if self.exponents is None else self.exponents.numel()

    def __getitem__(self, experts: Tensor | slice) -> Outputs:
        return Outputs(None if self.exponents is None else self.exponents[experts])

    @classmethod
    def cat(cls, parts: Sequence[Outputs]) -> Outputs:
        """Those of experts one after the other, which are all scaled or none."""
        found = [part.exponents for part in parts if part.exponents is not None]
        return cls(torch.cat(found) if found else None)

    def apply(self, X: Tensor) -> Tensor:
        """The rows of X (E, N, K) as they are coded; a new tensor."""
        signs = _signs(X)
        return _mixed(X * (signs if self.exponents is None else self.scales()[:, None] * signs))

    def undo(self, rows: Tensor, experts: Tensor | None = None) -> Tensor:
        """The inverse, for rows (n, N, K) of all experts or of those with these indices (n,), whose place it takes."""
        rows, signs = _mixed(rows), _signs(rows)
        if self.exponents is None:
            return rows.mul_(signs)
        inverse = scales(-STEP * (self.exponents if experts is None else self.exponents[experts]).int())
        return rows.mul_(inverse[:, None] * signs)

    def undo_products(self, products: Tensor, experts: Tensor | None = None) -> Tensor:
        """The inverse for products of tokens with rows, (n, K), to rounding, and fast.

        experts (n,): whose they are, to be told where outputs are scaled.
        """
        products = _multiplied_back(products)
        if self.exponents is None:
            return products
        assert experts is not None
        return products * scales(-STEP * self.exponents[experts].int())

    def undo_products_transposed(self, products: Tensor, experts: Tensor) -> Tensor:
        """What `undo_products` is to gradients, (n, K)."""
        if self.exponents is not None:
            products = products * scales(-STEP * self.exponents[experts].int())
        return rotate(products)

    def factors(self, experts: Tensor, num_outputs: int) -> Tensor:
        """By what outputs of these experts (n,) are multiplied last in `undo_products`, (n, K) or, for all alike,
        (1, K) float32: signs and inverse scales, and the power of the blocks' length if matrices are of ±1."""
        found = _cached_signs(num_outputs)
        return found if self.exponents is None else found * _inverse_scales()[self.exponents[experts].int() + 128]

    def is_sound(self) -> bool:
        """Whether no scale is out of its range."""
        return self.exponents is None or bool((self.exponents.int().abs() <= MOST_STEPS).all())

    def scales(self) -> Tensor:
        """d (E, K), float32."""
        assert self.exponents is not None
        return scales(STEP * self.exponents.int())


def fit_outputs(mean_squares: Tensor, num_inputs: int, weights: Tensor) -> Outputs:
    """The scales that suit outputs with these mean squares (E, K) over so many inputs, whose errors cost weights
    (E, K), or none where they do not pay."""
    mean_squares, weights = mean_squares.double(), weights.double()  # their ratios can be beyond float32
    known = (mean_squares > 0) & (weights > 0)
    wanted = torch.where(known, 0.5 * (weights.log2() - mean_squares.log2()), 0.0)  # log₂ d²
    wanted = wanted - (wanted.sum(1) / known.sum(1).clamp_min(1))[:, None]
    exponents = torch.where(known, wanted.round().clamp(-MOST_STEPS, MOST_STEPS), 0.0)
    squares = exponents.exp2()
    without = weights.mean(1) * mean_squares.mean(1)
    with_ = (weights / squares).mean(1) * (squares * mean_squares).mean(1)
    saved = 0.5 * torch.where(without > 0, without / with_, 1.0).log2().mean()
    pays = float(saved) > WORTH * 8 / num_inputs
    return Outputs(exponents.to(torch.int8) if pays else None)


def block_length(num_outputs: int) -> int:
    """The largest power of two that divides the outputs."""
    return num_outputs & -num_outputs


def rotate(x: Tensor) -> Tensor:
    """Outputs (..., K), rotated; a new tensor."""
    return _mixed(x * _signs(x))


def _multiplied_back(x: Tensor) -> Tensor:
    """The inverse of `rotate`, of (n, K), by few products: Hadamard matrices are Kronecker products of smaller ones."""
    K = x.shape[1]
    outer, inner = _hadamard_factors(block_length(K), x.device)
    blocks = x.reshape(len(x), K // block_length(K), len(outer), len(inner))
    blocks = outer.to(x) @ (blocks @ inner.to(x))
    if blocks.shape[1] > 1:
        blocks = blocks - blocks.sum(1, keepdim=True) * (2 / blocks.shape[1])
    return blocks.view(len(x), K) * _signs(x)


@torch.compiler.assume_constant_result  # pyright: ignore[reportUnknownMemberType]
def _hadamard_factors(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two orthogonal matrices whose Kronecker product is that of this length, float64."""
    return _cached_factors(length, device)


@functools.cache
def _cached_factors(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=device) * 0.5**0.5
    factors = [torch.ones_like(two[:1, :1])]
    while len(factors[-1]) < length:
        factors.append(torch.kron(factors[-1], two))
    half = len(factors) // 2
    return factors[half], factors[len(factors) - 1 - half]


@functools.cache
def _cached_signs(num_outputs: int) -> Tensor:
    """Signs (1, K), and the power of the blocks' length."""
    return _signs(torch.ones(num_outputs))[None] * block_length(num_outputs) ** -0.5


@functools.cache
def _inverse_scales() -> Tensor:
    """By the exponent of a scale plus 128."""
    return scales(-STEP * torch.arange(-128, 128, dtype=torch.int32))


def _signs(x: Tensor) -> Tensor:
    places = torch.arange(1, x.shape[-1] + 1, dtype=torch.int64, device=x.device)
    return (1 - 2 * ((places * _HASH >> 31) & 1)).to(x.dtype)


def _mixed(x: Tensor) -> Tensor:
    """`_mix` of a tensor of which nobody has need any more, in its place where numba does it: the same bits."""
    kernels, x = trellis.compiled(), x.contiguous()
    if kernels is None or x.device.type != "cpu" or x.dtype != torch.float32 or x.requires_grad:
        return _mix(x)
    rows, block = x.view(-1, x.shape[-1]), block_length(x.shape[-1])
    size = max(_LEAST_PER_THREAD // x.shape[-1], -(-len(rows) // torch.get_num_threads()), 1)
    scale, parts = np.float32(block**-0.5), [rows[start : start + size] for start in range(0, len(rows), size)]
    run_all([functools.partial(kernels.mix_rows, part.numpy(), block, scale) for part in parts])
    return x


def _mix(x: Tensor) -> Tensor:
    """Every block by the symmetric orthogonal Hadamard matrix, in as many passes as its length has bits, and across the
    blocks I − 2/r·11ᵀ: symmetric and orthogonal, too."""
    shape, length = x.shape, block_length(x.shape[-1])
    step = 1
    while step < length:
        left, right = x.reshape(*shape[:-1], shape[-1] // (2 * step), 2, step).unbind(-2)
        x = torch.stack([left + right, left - right], -2)
        step *= 2
    blocks = (x * length**-0.5).view(*shape[:-1], shape[-1] // length, length)
    if (count := blocks.shape[-2]) > 1:
        total = blocks[..., 0, :]
        for block in range(1, count):  # in this order on every machine
            total = total + blocks[..., block, :]
        blocks = blocks - (total * (2 / count))[..., None, :]
    return blocks.view(shape)
