"""The Viterbi search and its inverse for the CPU, compiled by numba: what `trellis` does in torch, number for number.

One function for each width, since the search is fast only where its inner loops have constant bounds. A cost is an
int32 that carries in its lowest `width` bits which predecessor it came from, so that one minimum finds both. The costs
of the states themselves are never stored: a step goes from what the 2^L / 2^b groups of predecessors cost to what the
groups of states do, and reads nothing but the (transposed) levels and those group costs, all of it in order.

Functions release the interpreter's lock and write to their last arguments. Only `trellis` and `packing` call them.
"""

# numba has no type stubs
# pyright: basic

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import njit

VECTOR = 16
"""int32 in the widest vector of a CPU."""


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy")
def _forward(x, levels, best, before, back, width, B, R, Q, W, U):
    """Take the costs of groups (best, in place) past entries x, and write how each was come by."""
    keep, low = np.int32(-B), np.int32(B - 1)
    for t in range(x.shape[0]):
        reference = best[0] & keep
        if Q > 1:
            for j in range(Q):
                for h in range(B):
                    cost = np.int32(np.int32(best[(j << width) | h] & keep) - reference)
                    before[h * W + j] = np.int32(cost | np.int32(h))
            for h in range(B):
                for j in range(Q, W):
                    before[h * W + j] = before[h * W + j - Q]
        else:
            for h in range(B):
                cost = np.int32(np.int32(best[h & (R - 1)] & keep) - reference)
                for j in range(W):
                    before[h * W + j] = np.int32(cost | np.int32(h))
        now = x[t]
        for base in range(0, R, W):
            for first in range(0, B, U):
                for j in range(W):
                    off = np.int32(now - levels[first * R + base + j])
                    least = np.int32(before[first * W + j] + np.int32(off * off))
                    for h in range(1, U):
                        off = np.int32(now - levels[(first + h) * R + base + j])
                        least = min(least, np.int32(before[(first + h) * W + j] + np.int32(off * off)))
                    best[base + j] = least if first == 0 else min(least, best[base + j])
        row = back[t]
        for r in range(R):
            row[r] = np.uint8(best[r] & low)


@functools.cache
def search(log_states: int, width: int, unreachable: int) -> Callable[..., None]:
    """`rows(x, levels, window, symbols, states)` for one width; see `trellis._search`, which it equals.

    x (n, K) int32, levels (2^b · 2^(L−b),) int32 with the level of state r·2^b + h at place h·2^(L−b) + r; writes
    symbols (n, K) uint8 and states (n, K) int32.
    """
    B, R = 1 << width, 1 << (log_states - width)
    Q = max(1, R >> width)  # group costs repeat with this period in the order in which they are read
    W = min(R, max(Q, VECTOR))
    U = min(B, VECTOR)

    @functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy", cache=True)
    def rows(x, levels, window, symbols, states):
        n, K = x.shape
        best, before = np.empty(R, np.int32), np.empty(B * W, np.int32)
        back = np.empty((max(K, 2 * window), R), np.uint8)
        around = np.empty(2 * window, np.int32)
        for i in range(n):
            for t in range(2 * window):
                around[t] = x[i, (t - window) % K]
            best[:] = 0
            _forward(around, levels, best, before, back, width, B, R, Q, W, U)
            closing = 0
            for r in range(1, R):
                if best[r] < best[closing]:
                    closing = r
            for t in range(2 * window - 1, window - 1, -1):
                closing = ((closing << width) | back[t, closing]) & (R - 1)
            best[:] = unreachable
            best[closing] = 0
            _forward(x[i], levels, best, before, back, width, B, R, Q, W, U)
            r = closing
            for t in range(K - 1, -1, -1):
                symbols[i, t] = back[t, r]
                state = (r << width) | back[t, r]
                states[i, t] = state
                r = state & (R - 1)

    return rows


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy", cache=True)
def decode_rows(payload, offsets, widths, steps, log_states, multiplier, addend, mean, out):
    """Rows of a payload, each `out` (n, K) float32 = level · step; see `packing.decode`, which it equals.

    offsets (n,) int64 of the rows' first bytes, widths (n,) uint8, steps (n,) float32.
    """
    K = out.shape[1]
    mask = np.uint32((1 << log_states) - 1)
    for i in range(out.shape[0]):
        width, offset, step = np.int64(widths[i]), offsets[i], steps[i]
        if width == 0:
            out[i] = 0
            continue
        bits = K * width
        for t in range(K):
            place = t * width
            byte, word = offset + (place >> 3), np.uint32(0)
            if (place >> 3) + 3 <= bits >> 3:
                word = np.uint32(payload[byte]) | np.uint32(payload[byte + 1] << 8) | np.uint32(payload[byte + 2] << 16)
                word >>= np.uint32(place & 7)
            else:  # the ring closes within this state
                for bit in range(log_states):
                    at = (place + bit) % bits
                    word |= np.uint32((payload[offset + (at >> 3)] >> (at & 7)) & 1) << np.uint32(bit)
            mixed = np.uint32(np.uint32(word & mask) * multiplier + addend)
            level = (mixed & 255) + ((mixed >> 8) & 255) + ((mixed >> 16) & 255) + (mixed >> 24)
            out[i, t] = np.float32(np.int32(level) - mean) * step
