"""QTIP (Tseng et al. 2024, arXiv 2406.11235): rotated weights, error feedback, a trellis, and one width for all.

    X' = U X Vᵀ,  C' = U C Uᵀ,   X' coded input after input with feedback in the metric of C',   X̂ = Uᵀ X̂' V

U and V are random orthogonal matrices that spread every entry over all others, so that X' looks like normal numbers of
one variance and a single scale serves a whole matrix: random signs and a Hadamard matrix, of order 2^a·12^b where the
size is that times another number, for which a small random orthogonal matrix stands in. The trellis is GloBE's own
(`globe.quant.trellis`: L = 12, 1MAD, tail-biting, as in the paper), its paths run along the outputs, and feedback is
from input to input, where the paper's takes 16 at a time. Fine-tuning is left out, here as in all methods.

Stored: the paths, and 16 bits for the scale of a matrix; U and V follow from a seed. The width is the same everywhere;
a budget between two widths is met by rows of either, evenly spread.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from benchmarks.calibration import Calibration, damped
from benchmarks.rivals.gptq import DAMPING
from benchmarks.stacks import Approximation, Stacks, as_inputs
from globe.errors import SettingsError
from globe.quant import trellis
from globe.quant.coded import rehearse
from globe.quant.feedback import code_inputs, order_inputs
from globe.quant.packing import rows_by_width

SCALE_BITS = 16


def hadamard(log2: int, twelves: int) -> Tensor:
    """An orthogonal matrix of order 2^log2 · 12^twelves whose entries have one magnitude."""
    residues = {x * x % 11 for x in range(1, 11)}
    paley = torch.eye(12)  # Paley's first construction: I + S with S skew, from the quadratic residues modulo 11
    paley[0, 1:], paley[1:, 0] = 1, -1
    for i in range(11):
        for j in range(11):
            if i != j:
                paley[i + 1, j + 1] += 1 if (i - j) % 11 in residues else -1
    found = torch.ones(1, 1)
    for factor in [torch.tensor([[1.0, 1.0], [1.0, -1.0]])] * log2 + [paley] * twelves:
        found = torch.kron(found, factor)
    return found / math.sqrt(len(found))


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix of this order that spreads every entry over all, or over as many as it can."""
    twos = (size & -size).bit_length() - 1
    threes = next(power for power in range(size) if size % 3 ** (power + 1))
    twelves = min(threes, twos // 2)
    found = hadamard(twos - 2 * twelves, twelves)
    rest = size // len(found)
    if rest > 1:
        found = torch.kron(found, torch.linalg.qr(torch.randn(rest, rest, generator=generator)).Q.contiguous())
    return found * (2 * torch.randint(2, (size,), generator=generator) - 1)


def spread_widths(num_rows: int, bits: float) -> Tensor:
    """Widths of rows (n,) uint8, in half bits: two neighbouring whole numbers of bits, evenly spread, of which the mean
    is at most `bits`."""
    low = min(int(bits), trellis.MAX_WIDTH // 2 - 1)
    if low < 1:
        raise SettingsError(f"a path has at least 1 bit an entry: {bits:g} are left")
    wider = min(num_rows, int(num_rows * (bits - low)))
    steps = torch.arange(num_rows + 1) * wider // num_rows
    return (2 * (low + steps.diff())).to(torch.uint8)


def code_rotated(X: Tensor, moment: Tensor, widths: Tensor, generator: torch.Generator) -> Tensor:
    """X (E, N, K) coded with widths (E, N) uint8, given the damped C (1 or E, N, N)."""
    U, V = rotation(X.shape[1], generator), rotation(X.shape[2], generator)
    rotated, order = U @ X @ V.mT, order_inputs(U @ moment @ U.mT)
    scales = rehearse(rotated, order, widths).mean_squares.mean(1).sqrt().half().float()
    steps = scales[:, None] * torch.tensor(trellis.GAIN)[widths.long()] / trellis.RMS
    sorted_widths, sorted_steps = order.sort(widths), order.sort(steps)
    levels, length = trellis.levels(), trellis.path_length(X.shape[2])

    def code_rows(i: int, rows: Tensor) -> Tensor:
        step = sorted_steps[:, i, None]
        unit = torch.nn.functional.pad(rows / step, (0, length - rows.shape[1]))
        coded = torch.empty_like(rows)
        for width, who in rows_by_width(sorted_widths[:, i], length):
            states = trellis.encode(unit[who], width)[1][:, : rows.shape[1]]
            coded[who] = levels[states].float() * step[who]
        return coded

    return U.mT @ order.unsort(code_inputs(order.sort(rotated), order, code_rows)) @ V


def qtip(stacks: Stacks, bits: float, calibration: Calibration, seed: int = 0) -> Approximation:
    """Code every layer and family in at most `bits` a weight, the scales counted."""
    began, approximation, total, found = time.monotonic(), {}, 0.0, set[int]()
    generator = torch.Generator().manual_seed(seed)
    for key, experts in stacks.items():
        X = as_inputs(experts, key[1])
        E, N, K = X.shape
        widths = spread_widths(E * N, bits - SCALE_BITS / (N * K)).view(E, N)
        coded = code_rotated(X, damped(calibration.moment(*key), DAMPING), widths, generator)
        approximation[key] = as_inputs(coded, key[1])
        total += K * int(widths.sum()) // 2 + SCALE_BITS * E
        found |= {width // 2 for width in widths.unique().tolist()}
    weights = sum(experts.numel() for experts in stacks.values())
    shape, seconds = f"{', '.join(map(str, sorted(found)))} bits", time.monotonic() - began
    return Approximation(approximation, weights, shape, seconds, bits=total / weights)
