"""The Viterbi search and its inverse for the CPU, compiled by numba: what `trellis` does in torch, number for number.

One function for each width, since they are fast only where their inner loops have constant bounds. A cost of the search
is an int32 that carries in its lowest bits which predecessor it came from, so that one minimum finds both. The costs
of the states themselves are never stored: a step goes from what the groups of predecessors cost to what the groups of
states do, and reads nothing but the (transposed) levels and those group costs, all of it in order.

Functions release the interpreter's lock and write to their last arguments. Only the modules of this package call them.
"""

# numba has no type stubs
# pyright: basic, reportCallIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import numba
import numpy as np
from numba import carray, cfunc, njit, types
from torch import Tensor

from globe.quant.threads import run_by_all
from globe.quant.trellis import LEAST_WIDTH, LOG_STATES, NUM_STATES
from globe.quant.vectors import (
    LANES,
    READ,
    ROWS,
    add_products,
    decode_groups,
    decode_last,
    least_sums,
    mix_lanes,
    mix_neighbours,
    pointer,
    take,
)

_LEAST_OF_ONE, _LEAST_OF_TWO, _LEAST_OF_FOUR = (least_sums(count) for count in (1, 2, 4))

_PAGE, _BEHIND = 1024, 64
"""int32 whose addresses end alike, and how far costs that are written lie before the place in a page of what is read
beside them: CPUs take a read for one of what was just written where the ends of the addresses are the same."""


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy")
def _step(now, levels, last, best, before, back, top, b, B, P, R, Q, W):
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
    if R >= 4 * W:
        _LEAST_OF_FOUR(now, levels, before, best, W, R, B)
    elif R >= 2 * W:
        _LEAST_OF_TWO(now, levels, before, best, W, R, B)
    else:
        _LEAST_OF_ONE(now, levels, before, best, W, R, B)
    for r in range(R):
        back[r] = np.uint8(best[r] & low)


@functools.cache
def search(even: int, odd: int) -> Callable[..., None]:
    """`rows(x, even_levels, odd_levels, window, unreachable, symbols, states)` for entries that move on by so many bits
    in turn; see `trellis._search`, which it equals.

    x (n, K) int32, K even; levels (2^L,) int32 of even and of odd entries, that of state r·2^b + h at place
    h·2^(L−b) + r; both in [0, 2¹⁵). Writes symbols (n, K) uint8 and states (n, K) int32.
    """
    top = 1 << max(even, odd)
    B0, R0, B1, R1 = 1 << even, NUM_STATES >> even, 1 << odd, NUM_STATES >> odd
    Q0, Q1 = max(1, R1 >> even), max(1, R0 >> odd)  # group costs repeat with these periods in the order of reading
    W0, W1 = min(R0, max(Q0, LANES)), min(R1, max(Q1, LANES))
    odd_at = 0 if even == odd else NUM_STATES  # the same levels twice would be too much for the first cache
    even_at = 4 * NUM_STATES + _PAGE - _BEHIND

    @functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy", cache=True)
    def rows(x, even_levels, odd_levels, window, unreachable, symbols, states):
        n, K = x.shape
        room = np.empty(7 * NUM_STATES, np.int32)
        room = room[-(room.ctypes.data >> 2) % _PAGE :]
        of_even_level, of_odd_level = room[:NUM_STATES], room[odd_at : odd_at + NUM_STATES]
        of_even_level[:], of_odd_level[:] = even_levels, odd_levels
        before0, before1 = room[2 * NUM_STATES :], room[3 * NUM_STATES :]
        of_even, of_odd = room[even_at : even_at + R0], room[even_at + NUM_STATES : even_at + NUM_STATES + R1]
        back = np.empty((max(K, 2 * window), max(R0, R1)), np.uint8)
        around = np.empty(2 * window, np.int32)
        for i in range(n):
            for t in range(2 * window):
                around[t] = x[i, (t - window) % K]
            of_odd[:] = 0
            for t in range(0, 2 * window, 2):
                _step(around[t], of_even_level, of_odd, of_even, before0, back[t], top, even, B0, R1, R0, Q0, W0)
                _step(around[t + 1], of_odd_level, of_even, of_odd, before1, back[t + 1], top, odd, B1, R0, R1, Q1, W1)
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
                _step(x[i, t], of_even_level, of_odd, of_even, before0, back[t], top, even, B0, R1, R0, Q0, W0)
                _step(x[i, t + 1], of_odd_level, of_even, of_odd, before1, back[t + 1], top, odd, B1, R0, R1, Q1, W1)
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
    of_two, two = np.empty(256, np.int64), np.empty(1, np.uint8)  # bytes of two rows, by the byte of their widths
    for byte in range(256):
        two[0] = byte
        of_two[byte] = ((_width(two, 0) * length + 14) >> 4) + ((_width(two, 1) * length + 14) >> 4)
    begins = np.zeros(E + 1, np.int64)
    for e in range(E):
        total = np.int64(0)
        for place in range(N // 2):
            total += of_two[packed_widths[e, place]]
        if N % 2:
            total += (_width(packed_widths[e], N - 1) * length + 14) >> 4
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


JOB = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("next", "num_tasks", "part"),
            *("payload", "num_bytes", "offsets", "widths", "steps", "num_inputs", "length"),
            *("x", "stride", "starts", "runs", "most"),
            *("out", "num_rows", "num_outputs", "block", "factors", "owners"),
        )
    ]
)
"""What the tasks of a worker need: numbers, and addresses of arrays.

next, num_tasks: counter of the tasks, and how many there are. part: what one of them is (outputs, rows).
payload (num_bytes,) uint8, offsets int64, widths uint8 and steps float32 (…, num_inputs) of runs, one run for each
expert that has tokens, length: see `decode_block`. The rest: see the workers.
"""
_job_type = numba.from_dtype(JOB)
_WORKER = types.void(types.CPointer(_job_type))


@njit(inline="always")
def _packed(job, run):
    """Payload, offsets, widths and steps of the rows of a run."""
    N = job.num_inputs
    return (
        carray(pointer(job.payload), (job.num_bytes,), np.uint8),
        carray(pointer(job.offsets + 8 * N * run), (N,), np.int64),
        carray(pointer(job.widths + N * run), (N,), np.uint8),
        carray(pointer(job.steps + 4 * N * run), (N,), np.float32),
    )


_ADD_ONE, _ADD_FOUR = add_products(1), add_products(4)


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy")
def _multiply_block(x, stride, num_tokens, packed, length, first, last, scratch, out, num_outputs):
    """Products of tokens with entries `first` to `last` of the rows of an expert, to out[token · num_outputs :].

    x is flat, of tokens `stride` long, a multiple of ROWS; scratch has room for ROWS + num_tokens times the entries,
    filled up to LANES. ROWS rows at a time are decoded into the first cache.
    """
    payload, offsets, widths, steps = packed
    ring, lanes = np.empty(READ, np.uint8), np.empty(LANES, np.float32)
    size = (last - first + LANES - 1) // LANES * LANES
    sums = scratch[ROWS * size :]
    scratch[: (ROWS + num_tokens) * size] = 0
    for i in range(0, len(offsets), ROWS):
        count = min(ROWS, len(offsets) - i)
        for j in range(count):
            row = i + j
            _decode_row(
                payload, offsets[row], widths[row], steps[row], length, first, last, ring, lanes, scratch, j * size
            )
        scratch[count * size : ROWS * size] = 0
        token = 0
        while token + 4 <= num_tokens:
            _ADD_FOUR(x, token * stride + i, stride, scratch, size, sums, token * size)
            token += 4
        while token < num_tokens:
            _ADD_ONE(x, token * stride + i, stride, scratch, size, sums, token * size)
            token += 1
    for token in range(num_tokens):
        at = token * num_outputs
        out[at + first : at + last] = sums[token * size : token * size + last - first]


def _multiply(place):
    """Tasks: `part` outputs of one of `runs`, of `most` tokens each at most.

    x (…, stride) and out (…, num_outputs) float32; the tokens of run r are those from starts[r] to starts[r + 1].
    """
    job = carray(place, 1)[0]
    room = np.empty((ROWS + job.most) * (job.part + LANES) + LANES, np.float32)
    scratch = room[-(room.ctypes.data >> 2) % LANES :]  # from where a line of the cache begins
    blocks = (job.num_outputs + job.part - 1) // job.part
    while True:
        task = take(place)
        if task >= job.num_tasks:
            return
        run = carray(pointer(job.runs + 8 * (task // blocks)), (1,), np.int64)[0]
        first = task % blocks * job.part
        starts = carray(pointer(job.starts + 8 * run), (2,), np.int64)
        begin, count = starts[0], starts[1] - starts[0]
        x = carray(pointer(job.x + 4 * begin * job.stride), (count * job.stride,), np.float32)
        out = carray(pointer(job.out + 4 * begin * job.num_outputs), (count * job.num_outputs,), np.float32)
        last = min(first + job.part, job.num_outputs)
        _multiply_block(x, job.stride, count, _packed(job, run), job.length, first, last, scratch, out, job.num_outputs)


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy")
def _hadamard(x, block):
    """Blocks of a row by the Hadamard matrix of entries ±1, in place."""
    step = 1
    if block >= LANES:
        for at in range(0, len(x), LANES):
            mix_lanes(x, at)
        step = LANES
    while step < block:
        for base in range(0, len(x), 2 * step):
            if step >= LANES:
                for at in range(base, base + step, LANES):
                    mix_neighbours(x, at, step)
            else:
                for at in range(base, base + step):
                    x[at], x[at + step] = x[at] + x[at + step], x[at] - x[at + step]
        step *= 2


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy")
def _reflect(x, block, total):
    """Blocks of a row at their mean, in place; total has room for a block."""
    count = len(x) // block
    if count > 1:
        total[:] = x[:block]
        for base in range(block, len(x), block):
            total += x[base : base + block]
        total *= np.float32(2 / count)
        for base in range(0, len(x), block):
            x[base : base + block] -= total


@functools.partial(njit, nogil=True, boundscheck=False, error_model="numpy", cache=True)
def mix_rows(rows, block, scale):
    """What `outputs._mix` does to rows (n, K) float32, in place; scale, float32: the block's length to the power −½."""
    total = np.empty(block, np.float32)
    for i in range(len(rows)):
        _hadamard(rows[i], block)
        rows[i] *= scale
        _reflect(rows[i], block, total)


def _rotate_back(place):
    """Tasks: `part` of the rows of out (num_rows, num_outputs) float32, in blocks of `block`, times factors.

    factors (…, num_outputs) float32; owners (num_rows,) int64: which of them.
    """
    job = carray(place, 1)[0]
    K, total = job.num_outputs, np.empty(job.block, np.float32)
    owners = carray(pointer(job.owners), (job.num_rows,), np.int64)
    while True:
        task = take(place)
        if task >= job.num_tasks:
            return
        for row in range(task * job.part, min((task + 1) * job.part, job.num_rows)):
            x = carray(pointer(job.out + 4 * row * K), (K,), np.float32)
            _hadamard(x, job.block)
            _reflect(x, job.block, total)
            x *= carray(pointer(job.factors + 4 * owners[row] * K), (K,), np.float32)


class Job:
    """Work for all threads: the fields of a `JOB`, arrays as tensors, which are held as long as it is."""

    def __init__(self, **fields: Tensor | int) -> None:
        self._fields = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in fields.items()}
        self._record = np.zeros(1, JOB)
        for name, field in self._fields.items():
            self._record[name] = field.data_ptr() if isinstance(field, Tensor) else field

    def run(self, name: Literal["multiply", "rotate_back"]) -> None:
        """Do all tasks by a worker."""
        run_by_all(_worker(name).address, self._record.ctypes.data)


@functools.cache
def _worker(name: str) -> Any:
    """A function that does tasks of the `JOB` at an address until none is left."""
    return cfunc(_WORKER, cache=True)({"multiply": _multiply, "rotate_back": _rotate_back}[name])
