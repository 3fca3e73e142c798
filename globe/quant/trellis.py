"""Rows of numbers as paths of a bit-shift trellis: each entry is read off a state of L = 12 bits of a ring.

A row of K entries of w half bits is a ring of K·w / 2 bits, and entry t is the level of the L bits that begin at bit
⌊t·w / 2⌋ (Tseng et al. 2024, QTIP, arXiv 2406.11235: bit-shift trellis, closed by tail-biting). Neighbours share most
of their bits, which is what makes their levels fill space better than those of a scalar quantiser; it also makes half
bits worth what they should be, though entries move on by ⌊w/2⌋ and ⌈w/2⌉ bits in turn. The level of a state is
computed, not stored: a 32-bit multiplication and addition, and the sum of the four bytes of what results (QTIP's 1MAD;
its numbers are found by search for L = 12). Everything up to the level is integers, so decoding is exact on every
machine.

`L`, the numbers of `levels` and the order of bits are fixed by the format, and so are `DISTORTION`, from which widths
of shared rows follow, and `GAIN`, from which steps do. Widths are half bits of an entry, everywhere: 0, or LEAST_WIDTH
to MAX_WIDTH.
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
LEAST_WIDTH, MAX_WIDTH = 2, 16
"""Half bits of an entry; of half a bit an entry, rows lose as much as half of them do of one."""
MULTIPLIER, ADDEND = 2524809683, 4196459566
"""The level of state s is the sum of the bytes of (MULTIPLIER · s + ADDEND) mod 2³², less MEAN."""
MEAN = 509
RMS = 136.688
"""Root mean square of the levels."""
LARGEST = 469
"""No level is larger, and the least is −475."""
DISTORTION = (
    *(1.0, 0.6415, 0.2736, 0.143, 0.0725, 0.0374, 0.01895, 0.00964, 0.00487),
    *(0.0025, 0.0013, 0.00067, 0.000351, 0.000197, 0.000117, 0.00007, 0.000046),
)
"""Mean squared error of long rows of independent normal entries of variance 1, by width."""
GAIN = (
    *(1.0, 0.8, 0.87, 0.99, 1.02, 1.06, 1.08, 1.09, 1.11),
    *(1.12, 1.15, 1.17, 1.19, 1.22, 1.23, 1.25, 1.25),
)
"""Root mean square of the levels over that of a normal row where the error is least, by width."""

_CLIP = 4.5
"""The search takes entries beyond this many times RMS for as large as this: no level is as large."""
_LEAST_PER_THREAD = 2**12
"""Entries that a thread searches at least: about a millisecond."""
_ABOVE = 2**14
"""What the compiled search adds to entries and levels, for none to be negative: they are within ±√(_LIMIT / 3) / 2."""
_LIMIT = 2**30
"""Above what a path can cost more than another that ends in the same entry, and what no path may begin at."""


@functools.cache
def levels(device: torch.device | None = None) -> Tensor:
    """The level of every state, (2^L,), int32."""
    states = torch.arange(NUM_STATES, dtype=torch.int64, device=device)
    mixed = (states * MULTIPLIER + ADDEND) & 0xFFFFFFFF
    return sum(((mixed >> shift) & 0xFF for shift in (0, 8, 16, 24)), -torch.full_like(states, MEAN)).to(torch.int32)


def path_length(num_outputs: int) -> int:
    """Entries of the path of a row of so many: an even number, and as many as it takes to close."""
    return max(num_outputs + num_outputs % 2, LOG_STATES)


def entry_bits(width: int) -> tuple[int, int]:
    """Bits by which even and odd entries move on."""
    return width // 2, width - width // 2


def fineness(width: int) -> int:
    """Parts into which the search divides the unit of a level: as many as keep its costs within 32 bits."""
    reach = 2 * _CLIP * RMS * 2 ** _spare(width)
    return max(1, int(math.sqrt(_LIMIT / (_hops(width) + 1)) / reach))


def seam(width: int, length: int) -> int:
    """Entries on either side of the seam that decide how a path of `length` entries closes; an even number.

    Four times as many as it takes from any state to any other lose 1 % of the least error at 128 entries, and less
    in longer rows; short rows get twice as many, around the ring more than once if need be.
    """
    return (4 if length >= 512 else 8) * _hops(width)


def _hops(width: int) -> int:
    """Entries within which any state reaches any other."""
    return math.ceil(2 * LOG_STATES / width)


def _spare(width: int) -> int:
    """Zero bits at the end of what is squared, for its square to end in as many as an entry moves on by."""
    return (max(entry_bits(width)) + 1) // 2


def encode(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The paths of least squared error of rows x (n, K), in units of a level, K even and >= LOG_STATES.

    Returns the symbols (n, K) uint8 of a path, of `entry_bits(width)` in turn, and its states (n, K) int32: the value
    of entry t is levels()[states[t]]. The error is least given how the path closes, which is decided by the
    entries next to the seam; `DISTORTION` has the price of that in it. Runs in numba on CPUs that have it, with the
    same result. Raises `ValueError` for other lengths and widths.
    """
    if not LEAST_WIDTH <= width <= MAX_WIDTH:
        raise ValueError(f"a path has {LEAST_WIDTH} to {MAX_WIDTH} half bits an entry: {width}")
    if x.shape[1] != path_length(x.shape[1]):
        raise ValueError(f"a path has at least {LOG_STATES} entries, and an even number of them: {x.shape[1]}")
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

    x (n, K) int32. After an entry that moves on by b bits, state r·2^b + h is followed by those whose lowest L − b bits
    are r; h is the symbol. A cost carries its predecessor's symbol in its lowest bits, which squares leave free.
    """
    n, K = x.shape
    moves = entry_bits(width)
    clear = -(1 << max(moves))
    scaled = _scaled_levels(width, x.device)
    states = torch.arange(NUM_STATES, device=x.device)
    rows = torch.arange(n, device=x.device)

    def forward(x: Tensor, best: Tensor) -> tuple[Tensor, list[Tensor]]:
        back: list[Tensor] = []
        for t, now in enumerate(x.unbind(1)):
            symbols, groups = 1 << moves[t % 2], NUM_STATES >> moves[(t + 1) % 2]
            before = (best & clear) - (best[:, :1] & clear)
            costs = before[:, states & (groups - 1)] | (states & (symbols - 1)).int()
            best = (costs + (now[:, None] - scaled).square()).view(n, -1, symbols).amin(2)
            back.append((best & (symbols - 1)).to(torch.uint8))
        return best, back

    def before(t: int, group: Tensor, symbol: Tensor) -> tuple[Tensor, Tensor]:
        """The state of entry t, and the group of the one before."""
        state = (group << moves[t % 2]) | symbol
        return state, state & ((NUM_STATES >> moves[(t + 1) % 2]) - 1)

    groups = NUM_STATES >> moves[1]
    best, back = forward(x[:, torch.arange(-window, window, device=x.device) % K], x.new_zeros(n, groups))
    closing = best.argmin(1)
    for t in reversed(range(window)):
        _, closing = before(t, closing, back[window + t][rows, closing])
    _, back = forward(x, x.new_full((n, groups), _LIMIT).scatter_(1, closing[:, None], 0))
    symbols, path, group = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x), closing
    for t in reversed(range(K)):
        symbols[:, t] = symbol = back[t][rows, group]
        path[:, t], group = before(t, group, symbol)
    return symbols, path


@functools.cache
def _transposed_levels(width: int) -> tuple[Any, Any]:
    """The same as numba wants them, for even and odd entries: by symbol, then by group."""
    scaled = _scaled_levels(width, torch.device("cpu")) + _ABOVE
    even, odd = (scaled.view(-1, 1 << bits).mT.contiguous().flatten().numpy() for bits in entry_bits(width))
    return even, odd


def _compiled_search(x: Tensor, width: int, window: int) -> tuple[Tensor, Tensor]:
    kernels = compiled()
    assert kernels is not None
    symbols, states = torch.empty_like(x, dtype=torch.uint8), torch.empty_like(x)
    rows, entries = kernels.search(*entry_bits(width)), x + _ABOVE

    def search(part: slice) -> None:
        levels = _transposed_levels(width)
        rows(entries[part].numpy(), *levels, window, _LIMIT, symbols[part].numpy(), states[part].numpy())

    num_parts = min(torch.get_num_threads(), len(x), 1 + x.numel() // _LEAST_PER_THREAD)
    size = -(-len(x) // max(1, num_parts))
    run_all([functools.partial(search, slice(start, start + size)) for start in range(0, len(x), size)])
    return symbols, states


def pairs(symbols: Tensor, width: int) -> Tensor:
    """Symbols (..., K), two and two: (..., K / 2) int64 of `width` bits each."""
    both = symbols.long().view(*symbols.shape[:-1], -1, 2)
    return both[..., 0] | both[..., 1] << entry_bits(width)[0]


def states(symbols: Tensor, width: int) -> Tensor:
    """The states (..., K), int32, of paths stored as symbols (..., K)."""
    two, first = pairs(symbols, width), entry_bits(width)[0]
    bits = torch.zeros_like(two)
    for place in range(math.ceil((first + LOG_STATES) / width)):
        bits |= two.roll(-place, dims=-1) << (place * width)
    return (torch.stack([bits, bits >> first], -1).flatten(-2) & (NUM_STATES - 1)).to(torch.int32)


@functools.cache
def compiled() -> Any:
    """`kernels`, or None without numba."""
    try:
        from globe.quant import kernels
    except ImportError:
        return None
    return kernels
