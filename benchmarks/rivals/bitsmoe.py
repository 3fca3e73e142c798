"""BitsMoE (arXiv 2606.00079): a basis for the experts of a layer in bfloat16, and factors of few bits in it.

    W_e ≈ F_e B,   B (r, D) for all experts of a layer, F_e (P, r) in 0 to 8 bits, a width for each column

The basis is that of the singular value decomposition of all experts stacked, in the metric of what an error costs the
layer's output (R Rᵀ = C, the second moment of the inputs):

    gate, up   [W_e R] = U S Vᵀ,   B = Vᵀ R⁻¹          down   [R_eᵀ W_e] = U S Vᵀ,   B = Vᵀ

so a column k of F_e that is off by δ costs ‖δ‖² and δᵀ C_e δ. The widths of all columns of all experts of a layer
minimise the sum of what the columns were measured to cost at each width, families weighted by their energy, within the
budget: the paper's integer program, solved by its Lagrangian, which leaves less than a column's bits unspent. The rank
r is the one at which that sum is least: the paper's models have up to 128 experts to share a basis of full rank, with 8
or 16 it would take more than all else. Gate and up share a basis, which the authors' code keeps twice.

Stored: the bases; for every column that is not left out its entries and a scale of 16 bits; 4 bits for a width. Levels
are symmetric and evenly spaced, the scale is the least-squares one, as in the authors' code. `count_basis` off leaves
out the bases, as if they were shared by any number of experts: what the method comes to where they cost nothing.
"""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor

from benchmarks.calibration import Calibration, damped
from benchmarks.rivals.gptq import DAMPING
from benchmarks.stacks import Approximation, Stacks
from globe.terms import Family

WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8)
FIRST_STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
"""Best steps for normal entries of variance 1 (Max 1960), from which the scale is improved."""
SCALE_BITS, WIDTH_BITS, BASIS_BITS = 16, 4, 16
RANKS = 16
"""Ranks that are tried: multiples of D / 16."""
ITERATIONS = 20
"""Of levels and scale in turn."""


def round_columns(F: Tensor, width: int) -> Tensor:
    """Columns of F (..., P, r), each to 2^width symmetric levels with its least-squares scale of half precision."""
    if width == 0:
        return torch.zeros_like(F)
    most = 2 ** (width - 1) - 0.5
    scale = FIRST_STEPS[width] * F.square().mean(-2, keepdim=True).sqrt()
    for _ in range(ITERATIONS):
        levels = _levels(F, scale, most)
        scale = (levels * F).sum(-2, keepdim=True) / levels.square().sum(-2, keepdim=True)
    scale = scale.half().float()
    return _levels(F, scale, most) * scale


def _levels(F: Tensor, scale: Tensor, most: float) -> Tensor:
    return ((F / scale.clamp_min(1e-12)).floor() + 0.5).clamp(-most, most)


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A family of a layer in its basis, by falling singular value."""

    F: Tensor
    """Factors (E, P, D)."""
    B: Tensor
    """Basis (D, D), in bfloat16's values."""
    errors: Tensor
    """What a column costs at each of `WIDTHS`, (E, D, widths), over what all cost when they are left out."""

    def approximation(self, choice: Tensor) -> Tensor:
        """The experts (E, P, D) with the columns' widths given by their places (E, r) in WIDTHS."""
        rank, found = choice.shape[1], torch.zeros_like(self.F[:, :, : choice.shape[1]])
        for place, width in enumerate(WIDTHS):
            found += round_columns(self.F[:, :, :rank], width) * (choice == place)[:, None]
        return found @ self.B[:rank]


def spectra(stacks: Stacks, layer: int, calibration: Calibration) -> dict[Family, Spectrum]:
    """Of a layer's families; gate and up have one basis."""
    inputs = damped(calibration.moment(layer, "gate"), DAMPING)
    root = torch.linalg.cholesky(inputs[0])
    whitened: dict[Family, Tensor] = {family: stacks[layer, family] @ root for family in ("gate", "up")}
    V = _right_vectors(torch.cat([*whitened.values()]))
    B = torch.linalg.solve_triangular(root, V.mT, upper=False, left=False).bfloat16().float()
    found = {family: _spectrum(each @ V, B, None) for family, each in whitened.items()}
    inner = damped(calibration.moment(layer, "down"), DAMPING)
    V = _right_vectors(torch.linalg.cholesky(inner).mT @ stacks[layer, "down"])
    found["down"] = _spectrum(stacks[layer, "down"] @ V, V.mT.bfloat16().float(), inner)
    return found


def _right_vectors(stack: Tensor) -> Tensor:
    """V (D, D) of matrices (n, P, D) on top of each other, by falling singular value."""
    rows = stack.flatten(0, 1).double()
    return torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(1).float()


def _spectrum(F: Tensor, B: Tensor, moment: Tensor | None) -> Spectrum:
    errors = list[Tensor]()
    for width in WIDTHS:
        off = F - round_columns(F, width)
        errors.append((off * (off if moment is None else moment @ off)).sum(1))
    found = torch.stack(errors, 2)
    return Spectrum(F, B, found / found[:, :, 0].sum())


def choose_widths(errors: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Places (n,) of the widths of columns with errors (n, widths) and costs (widths,) in bits within a budget."""
    high = 2 * float(errors.max())  # the price of a bit at which nothing is bought
    low = high * 2.0**-60
    for _ in range(60):
        price = (low * high) ** 0.5
        taken = costs[(errors + price * costs).argmin(1)].sum()
        low, high = (price, high) if float(taken) > budget else (low, price)
    return (errors + high * costs).argmin(1)


def bitsmoe(stacks: Stacks, bits: float, calibration: Calibration, count_basis: bool = True) -> Approximation:
    """Store every layer in at most `bits` a weight, the bases counted or not."""
    began, approximation, total, ranks = time.monotonic(), {}, 0.0, set[int]()
    for layer in sorted({layer for layer, _ in stacks}):
        found = spectra(stacks, layer, calibration)
        E, P, D = stacks[layer, "gate"].shape
        weights = 3 * E * P * D
        costs = torch.tensor([0.0 if width == 0 else width * P + SCALE_BITS for width in WIDTHS])
        best: tuple[float, Tensor, float] | None = None
        for rank in sorted({max(1, D * part // RANKS) for part in range(1, RANKS + 1)}):
            basis = 2 * rank * D * BASIS_BITS if count_basis else 0
            side = basis + 3 * E * rank * WIDTH_BITS
            if side > bits * weights or (rank < D and not count_basis):
                continue
            kept = torch.cat([each.errors[:, :rank].flatten(0, 1) for each in found.values()])
            choice = choose_widths(kept, costs, bits * weights - side)
            lost = float(kept.gather(1, choice[:, None]).sum())
            lost += sum(float(each.errors[:, rank:, 0].sum()) for each in found.values())
            if best is None or lost < best[0]:
                best = lost, choice.view(3, E, rank), side + float(costs[choice].sum())
        if best is None:
            raise ValueError(f"{bits:g} bits do not take the least basis of layer {layer}")
        _, choices, taken = best
        for (family, spectrum), choice in zip(found.items(), choices, strict=True):
            approximation[layer, family] = spectrum.approximation(choice)
        total += taken
        ranks.add(choices.shape[2])
    shape = f"r={', '.join(map(str, sorted(ranks)))}"
    numel = sum(experts.numel() for experts in stacks.values())
    seconds = time.monotonic() - began
    return Approximation({key: approximation[key] for key in stacks}, numel, shape, seconds, bits=total / numel)
