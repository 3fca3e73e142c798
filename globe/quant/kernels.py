"""The Viterbi search and its inverse for the CPU, compiled by numba: what `trellis` does in torch, number for number.

One function for each width, since they are fast only where their inner loops have constant bounds. A cost of the search
is an int32 that carries in its lowest bits which predecessor it came from, so that one minimum finds both. The costs
of the states themselves are never stored: a step goes from what the groups of predecessors cost to what the groups of
states do, and reads nothing but the (transposed) levels and those group costs, all of it in order.

Functions release the interpreter's lock and write to their last arguments. Only the modules of this package call them.
"""

# numba has no type stubs
# pyright: basic, reportCallIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import njit

from globe.quant.trellis import LEAST_WIDTH, LOG_STATES, NUM_STATES
from globe.quant.vectors import LANES, READ, decode_groups, decode_last

VECTOR = 16
"""int32 in the widest vector of a CPU."""
ROWS = 4
"""That are multiplied at a time."""


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy")
def _step(now, levels, last, best, before, back, top, b, B, P, R, Q, W, U):
    """From what P groups of predecessors cost (last) past an entry to what R groups of states do (best), and how each
    was come by (back)."""
    keep, low = np.int32(-top), np.int32(B - 1)
    reference = last[0] & keep
    if Q > 1:
        for j in range(Q):
            for h in range(B):
                cost = np.int32(np.int32(last[(j << b) | h] & keep) - reference)
                before[h * W + j] = np.int32(cost | np.int32(h))
        for h in range(B):
            for j in range(Q, W):
                before[h * W + j] = before[h * W + j - Q]
    else:
        for h in range(B):
            cost = np.int32(np.int32(last[h & (P - 1)] & keep) - reference)
            for j in range(W):
                before[h * W + j] = np.int32(cost | np.int32(h))
    for base in range(0, R, W):
        for first in range(0, B, U):
            for j in range(W):
                off = np.int32(now - levels[first * R + base + j])
                least = np.int32(before[first * W + j] + np.int32(off * off))
                for h in range(1, U):
                    off = np.int32(now - levels[(first + h) * R + base + j])
                    least = min(least, np.int32(before[(first + h) * W + j] + np.int32(off * off)))
                best[base + j] = least if first == 0 else min(least, best[base + j])
    for r in range(R):
        back[r] = np.uint8(best[r] & low)


@functools.cache
def search(even: int, odd: int) -> Callable[..., None]:
    """`rows(x, even_levels, odd_levels, window, unreachable, symbols, states)` for entries that move on by so many bits
    in turn; see `trellis._search`, which it equals.

    x (n, K) int32, K even; levels (2^L,) int32 of even and of odd entries, that of state r·2^b + h at place
    h·2^(L−b) + r; writes symbols (n, K) uint8 and states (n, K) int32.
    """
    top = 1 << max(even, odd)
    B0, R0, B1, R1 = 1 << even, NUM_STATES >> even, 1 << odd, NUM_STATES >> odd
    Q0, Q1 = max(1, R1 >> even), max(1, R0 >> odd)  # group costs repeat with these periods in the order of reading
    W0, W1 = min(R0, max(Q0, VECTOR)), min(R1, max(Q1, VECTOR))
    U0, U1 = min(B0, VECTOR), min(B1, VECTOR)

    @functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy", cache=True)
    def rows(x, even_levels, odd_levels, window, unreachable, symbols, states):
        n, K = x.shape
        of_even, of_odd = np.empty(R0, np.int32), np.empty(R1, np.int32)
        before0, before1 = np.empty(B0 * W0, np.int32), np.empty(B1 * W1, np.int32)
        back = np.empty((max(K, 2 * window), max(R0, R1)), np.uint8)
        around = np.empty(2 * window, np.int32)
        for i in range(n):
            for t in range(2 * window):
                around[t] = x[i, (t - window) % K]
            of_odd[:] = 0
            for t in range(0, 2 * window, 2):
                _step(around[t], even_levels, of_odd, of_even, before0, back[t], top, even, B0, R1, R0, Q0, W0, U0)
                _step(
                    around[t + 1], odd_levels, of_even, of_odd, before1, back[t + 1], top, odd, B1, R0, R1, Q1, W1, U1
                )
            closing = 0
            for r in range(1, R1):
                if of_odd[r] < of_odd[closing]:
                    closing = r
            for t in range(2 * window - 1, window - 1, -2):
                closing = ((closing << odd) | back[t, closing]) & (R0 - 1)
                closing = ((closing << even) | back[t - 1, closing]) & (R1 - 1)
            of_odd[:] = unreachable
            of_odd[closing] = 0
            for t in range(0, K, 2):
                _step(x[i, t], even_levels, of_odd, of_even, before0, back[t], top, even, B0, R1, R0, Q0, W0, U0)
                _step(x[i, t + 1], odd_levels, of_even, of_odd, before1, back[t + 1], top, odd, B1, R0, R1, Q1, W1, U1)
            r = closing
            for t in range(K - 1, -1, -2):
                symbols[i, t] = back[t, r]
                states[i, t] = (r << odd) | back[t, r]
                r = states[i, t] & (R0 - 1)
                symbols[i, t - 1] = back[t - 1, r]
                states[i, t - 1] = (r << even) | back[t - 1, r]
                r = states[i, t - 1] & (R1 - 1)

    return rows


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy")
def _copy_ring(payload, begin, bits, byte, ring):
    """READ bytes of a row of so many bits from one of its bytes on, and from its first bit again behind its last."""
    head = np.int64(payload[begin]) | np.int64(payload[begin + 1]) << 8
    for place in range(READ):
        left = bits - 8 * (byte + place)
        value = np.int64(payload[begin + byte + place]) if left > 0 else np.int64(0)
        if left < 8:
            value = value & ((1 << left) - 1) | head << left if left >= 0 else head >> min(-left, 63)
        ring[place] = value & 255


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy", inline="always")
def _decode_row(payload, begin, width, step, length, first, last, ring, lanes, out, at):
    """Entries `first` (a multiple of LANES) to `last` of a row of `length` that begins at a byte, to out[at:].

    `ring` (READ,) and `lanes` (LANES,) are for what is left where no vector can be read or written.
    """
    if width == 0:
        out[at : at + last - first] = 0
        return
    start = begin + (first * width >> 4)
    count = max(0, min(last - first, length - first - LOG_STATES + 1)) // LANES  # before the ring closes, at any width
    while count > 0 and start + width * (count - 1) + READ > len(payload):
        count -= 1
    decode_groups(payload, start, count, width, step, out, at)
    done = first + LANES * count
    if done + LANES == last == length and start + width * count + READ <= len(payload):
        decode_last(payload, start + width * count, begin, width, step, out, at + LANES * count)
        return
    for t in range(done, last, LANES):
        _copy_ring(payload, begin, length * width >> 1, t * width >> 4, ring)
        decode_groups(ring, 0, 1, width, step, lanes, 0)
        end = min(t + LANES, last)
        out[at + t - first : at + end - first] = lanes[: end - t]


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy", cache=True)
def decode_block(payload, offsets, widths, steps, length, first, last, out):
    """Entries `first` (a multiple of LANES) to `last` of n rows of a payload, level · step each.

    offsets (n,) int64 of the rows' first bytes, widths (n,) uint8, steps (n,) float32; writes out (n, last - first),
    float32, or uint16 that are the bits of bfloat16. See `packing.decode`, which it equals.
    """
    ring, lanes, flat = np.empty(READ, np.uint8), np.empty(LANES, out.dtype), out.reshape(-1)
    for i in range(len(offsets)):
        at = i * (last - first)
        _decode_row(payload, offsets[i], widths[i], steps[i], length, first, last, ring, lanes, flat, at)


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy", cache=True)
def own_rows(packed_widths, scales, bases, experts, length, step_table, offsets, widths, steps):
    """Where the rows of some experts (n,) lie, with widths and steps; see `coded.CodedExperts.rows`, which it equals.

    The first three as in `side.OwnRows`; step_table (2·m + 1, widths) float32 has the steps of the scale exponents from
    −m to m. Writes offsets int64, widths uint8, steps float32, (n, N) each.
    """
    E, N = scales.shape
    begins = np.zeros(E + 1, np.int64)
    for e in range(E):
        total = np.int64(0)
        for i in range(N):
            total += (_width(packed_widths[e], i) * length + 14) >> 4
        begins[e + 1] = begins[e] + total
    largest = len(step_table) // 2
    for j in range(len(experts)):
        expert = experts[j]
        offset, base = begins[expert], np.int64(bases[expert])
        for i in range(N):
            width = _width(packed_widths[expert], i)
            exponent = base - np.int64(scales[expert, i])
            offsets[j, i], widths[j, i] = offset, width
            steps[j, i] = step_table[min(max(exponent, -largest), largest) + largest, width]
            offset += (width * length + 14) >> 4


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy", inline="always")
def _width(packed_widths, i):
    """Of the i-th row of an expert."""
    step = np.int64(packed_widths[i >> 1] >> (4 * (i & 1))) & 15
    return step + (LEAST_WIDTH - 1) if step > 0 else step


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy", fastmath={"contract"}, cache=True)
def multiply_block(x, payload, offsets, widths, steps, length, first, last, rows, out):
    """Add the products of x (m, n) with entries `first` to `last` of n rows to out[:, first:last], float32 both.

    The rows are as in `decode_block`. ROWS of them at a time are decoded into the first cache.
    """
    ring, lanes = np.empty(READ, np.uint8), np.empty(LANES, np.float32)
    flat, size = rows.reshape(-1), last - first
    flat[:] = 0
    for i in range(0, len(offsets), ROWS):
        count = min(ROWS, len(offsets) - i)
        for j in range(i, i + count):
            at = (j - i) * size
            _decode_row(payload, offsets[j], widths[j], steps[j], length, first, last, ring, lanes, flat, at)
        for m in range(len(x)):
            a = x[m, i]
            b = x[m, i + 1] if count > 1 else np.float32(0)
            c = x[m, i + 2] if count > 2 else np.float32(0)
            d = x[m, i + 3] if count > 3 else np.float32(0)
            sums = out[m, first:last]
            for k in range(size):
                sums[k] = sums[k] + a * rows[0, k] + b * rows[1, k] + c * rows[2, k] + d * rows[3, k]
