"""Rows of numbers as paths of a bit-shift trellis: b bits an entry, each entry read off a state of L = 12 bits.

A row of K entries is a ring of K·b bits, and entry t is the level of the L bits that begin at bit t·b (Tseng et al.
2024, QTIP, arXiv 2406.11235: bit-shift trellis, closed by tail-biting). Consecutive entries share L − b of their bits,
which is what makes their levels fill space better than those of a scalar quantiser. The level of a state is computed,
not stored: a 32-bit multiplication and addition, and the sum of the four bytes of what results (QTIP's 1MAD, its two
numbers found by search for L = 12). Everything up to the level is integers, so decoding is exact on every machine.

`L`, the numbers of `levels` and the order of bits are fixed by the format; `DISTORTION` is what the quantiser loses.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from globe.quant.threads import run_all

LOG_STATES = 12
"""L: bits of a state."""
NUM_STATES = 2**LOG_STATES
MAX_WIDTH = 8
"""Bits of an entry, at most."""
MULTIPLIER, ADDEND = 2524809683, 4196459566
"""The level of state s is the sum of the bytes of (MULTIPLIER · s + ADDEND) mod 2³², less MEAN."""
MEAN = 509
RMS = 136.688
"""Root mean square of the levels."""
LARGEST = 469
"""No level is larger, and the least is −475."""
DISTORTION = (1.0, 0.2736, 0.0725, 0.01895, 0.00487, 0.0013, 0.000351, 0.000117, 0.000046)
"""Mean squared error of long rows of independent normal entries of variance 1, by width."""
GAIN = (1.0, 0.87, 1.02, 1.08, 1.11, 1.14, 1.17, 1.18, 1.2)
"""Root mean square of the levels over that of a normal row where the error is least, by width."""

_CLIP = 4.5
"""The search takes entries beyond this many times RMS for as large as this: no level is as large."""
_LEAST_PER_THREAD = 2**12
"""Entries that a thread searches at least: about a millisecond."""
_LIMIT = 2**30
"""Above what a path can cost more than another that ends in the same entry, and what no path may begin at."""


@functools.cache
def levels(device: torch.device | None = None) -> Tensor:
    """The level of every state, (2^L,), int32."""
    states = torch.arange(NUM_STATES, dtype=torch.int64, device=device)
    mixed = (states * MULTIPLIER + ADDEND) & 0xFFFFFFFF
    return sum(((mixed >> shift) & 0xFF for shift in (0, 8, 16, 24)), -torch.full_like(states, MEAN)).to(torch.int32)


def fineness(width: int) -> int:
    """Parts into which the search divides the unit of a level: as many as keep its costs within 32 bits."""
    hops = math.ceil(LOG_STATES / width) + 1  # within so many entries any state reaches any other
    reach = 2 * _CLIP * RMS * 2 ** _spare(width)
    return max(1, int(math.sqrt(_LIMIT / hops) / reach))


def seam(width: int, length: int) -> int:
    """Entries on either side of the seam that decide how a path of `length` entries closes.

    Four times as many as it takes from any state to any other lose 1 % of the least error at 128 entries, and less
    in longer rows; short rows get twice as many, around the ring more than once if need be.
    """
    return (4 if length >= 512 else 8) * math.ceil(LOG_STATES / width)


def _spare(width: int) -> int:
    """Zero bits at the end of what is squared, for its square to end in at least `width` of them."""
    return (width + 1) // 2


def encode(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The paths of least squared error of rows x (n, K), in units of a level, K >= LOG_STATES.

    Returns the symbols (n, K) uint8, of `width` bits each, in which a path is stored, and the states (n, K) int32: the
    value of entry t is levels()[states[t]]. The error is least given how the path closes, which is decided by the
    entries next to the seam; `DISTORTION` has the price of that in it. Runs in numba on CPUs that have it, with the
    same result. Raises `ValueError` for shorter rows and other widths.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"a path has 1 to {MAX_WIDTH} bits an entry: {width}")
    if x.shape[1] < LOG_STATES:
        raise ValueError(f"a path has at least {LOG_STATES} entries, for its first state to fit in: {x.shape[1]}")
    parts = fineness(width)
    bound = int(_CLIP * RMS) * parts
    fine = (x.float() * parts).round_().clamp_(-bound, bound).to(torch.int32) << _spare(width)
    search = _compiled_search if x.device.type == "cpu" and compiled() is not None else _search
    return search(fine, width, seam(width, x.shape[1]))


@functools.cache
def _scaled_levels(width: int, device: torch.device) -> Tensor:
    """Levels as the search has them, (2^L,) int32."""
    return (levels(device) * fineness(width)) << _spare(width)


def _search(x: Tensor, width: int, window: int) -> tuple[Tensor, Tensor]:
    """Viterbi's algorithm (1967) over integers, twice: around the seam to learn where the path closes, then along it.

    x (n, K) int32. State r·2^b + h is followed by those whose lowest L − b bits are r; h is the symbol. A cost carries
    its predecessor's symbol in its lowest b bits, which squares leave free.
    """
    n, K = x.shape
    B, R = 2**width, NUM_STATES >> width
    scaled = _scaled_levels(width, x.device)
    states = torch.arange(NUM_STATES, device=x.device)
    rows = torch.arange(n, device=x.device)

    def forward(x: Tensor, best: Tensor) -> tuple[Tensor, list[Tensor]]:
        back: list[Tensor] = []
        for now in x.unbind(1):
            before = (best & -B) - (best[:, :1] & -B)
            costs = (before[:, states & (R - 1)] | (states & (B - 1)).int()) + (now[:, None] - scaled).square()
            best = costs.view(n, R, B).amin(2)
            back.append((best & (B - 1)).to(torch.uint8))
        return best, back

    around = torch.arange(-window, window, device=x.device) % K
    best, back = forward(x[:, around], x.new_zeros(n, R))
    closing = best.argmin(1)
    for symbol in reversed(back[window:]):
        closing = ((closing << width) | symbol[rows, closing]) & (R - 1)
    _, back = forward(x, x.new_full((n, R), _LIMIT).scatter_(1, closing[:, None], 0))
    symbols, path, group = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x), closing
    for t in reversed(range(K)):
        symbols[:, t] = symbol = back[t][rows, group]
        state = (group << width) | symbol
        path[:, t] = state
        group = state & (R - 1)
    return symbols, path


@functools.cache
def _transposed_levels(width: int) -> Any:
    """The same as numba wants them: by symbol, then by group."""
    return _scaled_levels(width, torch.device("cpu")).view(-1, 2**width).mT.contiguous().flatten().numpy()


def _compiled_search(x: Tensor, width: int, window: int) -> tuple[Tensor, Tensor]:
    kernels = compiled()
    assert kernels is not None
    symbols, states = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
    rows, entries = kernels.search(LOG_STATES, width, _LIMIT), x.contiguous()

    def search(part: slice) -> None:
        rows(entries[part].numpy(), _transposed_levels(width), window, symbols[part].numpy(), states[part].numpy())

    num_parts = min(torch.get_num_threads(), len(x), 1 + x.numel() // _LEAST_PER_THREAD)
    size = -(-len(x) // max(1, num_parts))
    run_all([functools.partial(search, slice(start, start + size)) for start in range(0, len(x), size)])
    return symbols, states


def states(symbols: Tensor, width: int) -> Tensor:
    """The states (..., K), int32, of paths stored as symbols (..., K) of `width` bits."""
    found = torch.zeros_like(symbols, dtype=torch.int32)
    for place in range(math.ceil(LOG_STATES / width)):
        found |= symbols.roll(-place, dims=-1).int() << (place * width)
    return found & (NUM_STATES - 1)


@functools.cache
def compiled() -> Any:
    """`kernels`, or None without numba."""
    try:
        from globe.quant import kernels
    except ImportError:
        return None
    return kernels
