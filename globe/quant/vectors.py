"""What is done to sixteen numbers at a time, written as LLVM's vectors, which it turns into what the CPU has.

Sixteen entries of w half bits begin at a byte and take w bytes, so that where each one's bits are within them is known
beforehand: one permutation of bytes and one shift bring every state into a lane of its own. Compilers do not find that
by themselves, and fetch the states one by one at a third of the speed; nor do they vectorise loops over several arrays
that might overlap for all they know.
"""

# numba and llvmlite have no type stubs
# pyright: basic

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from globe.quant.trellis import ADDEND, LEAST_WIDTH, MAX_WIDTH, MEAN, MULTIPLIER, NUM_STATES

LANES = 16
ROWS = 4
"""That are multiplied at a time."""
READ = 32
"""Bytes that are read where sixteen entries begin, at any width."""


class _BFloat(ir.Type):
    """What llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_WORDS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_WORDS, [value] * LANES)


def least_sums(num_periods: int) -> Any:
    """`least(now, levels, before, best, period, size, count)`:

        best[r] = min_h (before[h·period + r mod period] + (now − levels[h·size + r])²),  r < size, h < count

    of int32, `now` and the levels in [0, 2¹⁵). `size` is a multiple of so many periods, each a multiple of LANES.
    """

    @intrinsic
    def least(typing_context, now, levels, before, best, period, size, count):  # noqa: ARG001
        signature = types.void(types.int32, levels, before, best, types.int64, types.int64, types.int64)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            now, levels, before, best, period, size, count = arguments
            levels, before, best = (
                context.make_array(kind)(context, builder, array).data
                for kind, array in zip(signature.args[1:4], (levels, before, best), strict=True)
            )
            now, most = _in_all_lanes(builder, now), _splat(2**31 - 1)
            lowest = [cgutils.alloca_once(builder, _WORDS) for _ in range(num_periods)]
            with (
                cgutils.for_range_slice(builder, _I64(0), size, builder.mul(period, _I64(num_periods))) as (base, _),
                cgutils.for_range_slice(builder, _I64(0), period, _I64(LANES)) as (j, _),
            ):
                first = builder.add(base, j)
                places = [builder.add(first, builder.mul(period, _I64(i))) for i in range(num_periods)]
                for each in lowest:
                    builder.store(most, each)
                with cgutils.for_range(builder, count) as loop:
                    at = builder.add(builder.mul(loop.index, period), j)
                    cost, row = _load(builder, builder.gep(before, [at]), _WORDS), builder.mul(loop.index, size)
                    for place, each in zip(places, lowest, strict=True):
                        level = _load(builder, builder.gep(levels, [builder.add(row, place)]), _WORDS)
                        total, other = _add_square(context, builder, cost, now, level), builder.load(each)
                        builder.store(builder.select(builder.icmp_signed("<", total, other), total, other), each)
                for place, each in zip(places, lowest, strict=True):
                    _store(builder, builder.load(each), builder.gep(best, [place]))
            return context.get_dummy_value()

        return signature, generate

    return least


@intrinsic
def decode_groups(typing_context, payload, place, count, width, step, out, at):  # noqa: ARG001
    """Write level · step of `count` times sixteen entries to out[at:], float32, or uint16 that are bits of bfloat16.

    They begin at payload[place], where READ bytes are read for each sixteen. All arrays are flat.
    """
    signature = types.void(payload, types.int64, types.int64, types.int64, types.float32, out, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        payload, place, count, width, step, out, at = arguments
        source = builder.gep(context.make_array(signature.args[0])(context, builder, payload).data, [place])
        write = _writer(context, builder, signature.args[5], out, step)
        for w in _each_width(builder, width):
            with cgutils.for_range(builder, count) as loop:
                here = builder.gep(source, [builder.mul(loop.index, _I64(w))])
                write(w, here, builder.add(at, builder.mul(loop.index, _I64(LANES))))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def decode_last(typing_context, payload, place, begin, width, step, out, at):  # noqa: ARG001
    """The same for the last sixteen of a ring that begins at payload[begin]."""
    signature = types.void(payload, types.int64, types.int64, types.int64, types.float32, out, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        payload, place, begin, width, step, out, at = arguments
        source = context.make_array(signature.args[0])(context, builder, payload).data
        write = _writer(context, builder, signature.args[5], out, step)
        ring = cgutils.alloca_once(builder, _I8, READ)
        _store(builder, _load(builder, builder.gep(source, [place]), ir.VectorType(_I8, READ)), ring)
        head = _load(builder, builder.gep(source, [begin]), _I32)
        for w in _each_width(builder, width):
            _store(builder, head, builder.gep(ring, [_I64(w)]))
            write(w, ring, at)
        return context.get_dummy_value()

    return signature, generate


def add_products(num_tokens: int) -> Any:
    """`add(x, at, stride, rows, size, sums, into)`: sums[into + t·size :] += Σ_j x[at + t·stride + j] rows[j·size :].

    For so many tokens t and ROWS rows j of `size` entries, a multiple of LANES. All arrays are flat and float32.
    """

    @intrinsic
    def add(typing_context, x, at, stride, rows, size, sums, into):  # noqa: ARG001
        signature = types.void(x, types.int64, types.int64, rows, types.int64, sums, types.int64)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, at, stride, rows, size, sums, into = arguments
            x, rows, sums = (
                context.make_array(kind)(context, builder, array).data
                for kind, array in zip((signature.args[i] for i in (0, 3, 5)), (x, rows, sums), strict=True)
            )
            places = [
                builder.add(at, builder.add(builder.mul(stride, _I64(t)), _I64(j)))
                for t in range(num_tokens)
                for j in range(ROWS)
            ]
            factors = [_in_all_lanes(builder, builder.load(builder.gep(x, [place]))) for place in places]
            with cgutils.for_range(builder, builder.udiv(size, _I64(LANES))) as loop:
                k = builder.mul(loop.index, _I64(LANES))
                read = [
                    _load(builder, builder.gep(rows, [builder.add(k, builder.mul(size, _I64(j)))]), _FLOATS)
                    for j in range(ROWS)
                ]
                for t in range(num_tokens):
                    place = builder.gep(sums, [builder.add(builder.add(into, k), builder.mul(size, _I64(t)))])
                    total = _load(builder, place, _FLOATS)
                    for factor, row in zip(factors[t * ROWS :], read, strict=False):
                        total = _multiply_add(builder, factor, row, total)
                    _store(builder, total, place)
            return context.get_dummy_value()

        return signature, generate

    return add


@intrinsic
def mix_lanes(typing_context, x, at):  # noqa: ARG001
    """Multiply x[at : at + LANES], float32, by the Hadamard matrix of so many, of entries ±1, in place."""
    signature = types.void(x, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, at = arguments
        place = builder.gep(context.make_array(signature.args[0])(context, builder, x).data, [at])
        values = _load(builder, place, _FLOATS)
        step = 1
        while step < LANES:
            others = ir.Constant(_WORDS, [lane ^ step for lane in range(LANES)])
            signs = ir.Constant(_FLOATS, [-1.0 if lane & step else 1.0 for lane in range(LANES)])
            partners = builder.shuffle_vector(values, ir.Constant(_FLOATS, ir.Undefined), others)
            values = _multiply_add(builder, values, signs, partners)
            step *= 2
        _store(builder, values, place)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def mix_neighbours(typing_context, x, at, step):  # noqa: ARG001
    """Sums and differences of x[at : at + LANES] and what is `step` behind, float32, in their places."""
    signature = types.void(x, types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, at, step = arguments
        data = context.make_array(signature.args[0])(context, builder, x).data
        places = builder.gep(data, [at]), builder.gep(data, [builder.add(at, step)])
        left, right = (_load(builder, place, _FLOATS) for place in places)
        _store(builder, builder.fadd(left, right), places[0])
        _store(builder, builder.fsub(left, right), places[1])
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def pointer(typing_context, address):  # noqa: ARG001
    """A number as the address that it is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def take(typing_context, counter):  # noqa: ARG001
    """The next number of an int64 that a pointer points to, for one of all threads that ask."""
    signature = types.int64(counter)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place = builder.bitcast(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", place, _I64(1), "monotonic")

    return signature, generate


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, rounded once where the CPU can."""
    return builder.fadd(builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])


def _in_all_lanes(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, value, _I32(0)), undefined, _splat(0))


def _load(builder: Any, pointer: Any, kind: Any) -> Any:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, pointer: Any, align: int = 1) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def _each_width(builder: Any, width: Any) -> Any:
    """Every width in turn, as a constant; what is built meanwhile runs only where it is the right one."""
    end = builder.append_basic_block("end")
    switch = builder.switch(width, end)
    for w in range(LEAST_WIDTH, MAX_WIDTH + 1):
        block = builder.append_basic_block(f"width.{w}")
        switch.add_case(_I64(w), block)
        builder.position_at_end(block)
        yield w
        builder.branch(end)
    builder.position_at_end(end)


def _writer(context: Any, builder: Any, target_type: Any, out: Any, step: Any) -> Any:
    target = context.make_array(target_type)(context, builder, out).data
    steps = _in_all_lanes(builder, step)

    def write(w: int, source: Any, at: Any) -> None:
        """Sixteen entries of w half bits that begin at a byte."""
        shifts = ir.Constant(_WORDS, [(lane * w >> 1) % 8 for lane in range(LANES)])
        words = _words(context, builder, w, source)
        states = builder.and_(builder.lshr(words, shifts), _splat(NUM_STATES - 1))
        mixed = builder.add(builder.mul(states, _splat(MULTIPLIER)), _splat(ADDEND))
        values = builder.fmul(builder.sitofp(_levels(context, builder, mixed), _FLOATS), steps)
        if target_type.dtype == types.uint16:
            values = _to_bfloat16(context, builder, values)
        _store(builder, values, builder.gep(target, [at]), target_type.dtype.bitwidth // 8)

    return write


def _words(context: Any, builder: Any, w: int, source: Any) -> Any:
    """The four bytes from the first on in which each of sixteen entries of w half bits lies."""
    begins = [lane * w // 16 for lane in range(LANES)]
    size = LANES if _has(context, "avx512vbmi") else 4  # lanes that one permutation can fill: of 64 bytes, or of 16
    parts: list[Any] = []
    for lane in range(0, LANES, size):
        block = ir.VectorType(_I8, READ if size == LANES else 4 * size)
        order = [begin - begins[lane] + byte for begin in begins[lane : lane + size] for byte in range(4)]
        found = _load(builder, builder.gep(source, [_I64(begins[lane])]), block)
        undefined, places = ir.Constant(block, ir.Undefined), ir.Constant(ir.VectorType(_I32, 4 * size), order)
        parts.append(builder.bitcast(builder.shuffle_vector(found, undefined, places), ir.VectorType(_I32, size)))
    while len(parts) > 1:
        places = ir.Constant(ir.VectorType(_I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [builder.shuffle_vector(*pair, places) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _has(context: Any, feature: str) -> bool:
    """Whether the CPU that is compiled for has an instruction."""
    return f"+{feature}" in context.codegen().magic_tuple()[2].split(",")


def _levels(context: Any, builder: Any, mixed: Any) -> Any:
    """Sums of the four bytes of each lane, less MEAN."""
    if _has(context, "avx512vnni"):  # LLVM does not find this by itself
        kind = ir.FunctionType(_WORDS, [_WORDS] * 3)
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(dot, [_splat(-MEAN), mixed, _splat(0x01010101)])
    odd = builder.and_(builder.lshr(mixed, _splat(8)), _splat(0x00FF00FF))
    pairs = builder.add(builder.and_(mixed, _splat(0x00FF00FF)), odd)
    sums = builder.lshr(builder.mul(pairs, _splat(0x00010001)), _splat(16))
    return builder.sub(sums, _splat(MEAN))


def _add_square(context: Any, builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total + (a − b)² for a and b in [0, 2¹⁵)."""
    if _has(context, "avx512vnni"):
        pairs = ir.VectorType(ir.IntType(16), 2 * LANES)
        off = builder.sub(builder.bitcast(a, pairs), builder.bitcast(b, pairs))  # all higher halves are zero
        off = builder.bitcast(off, _WORDS)
        kind = ir.FunctionType(_WORDS, [_WORDS] * 3)
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpwssd.512")
        return builder.call(dot, [total, off, off])
    off = builder.sub(a, b)
    return builder.add(total, builder.mul(off, off))


def _to_bfloat16(context: Any, builder: Any, values: Any) -> Any:
    """To the nearest, of two the even one."""
    if _has(context, "avx512bf16"):  # without, LLVM calls a function that is not there
        return builder.fptrunc(values, ir.VectorType(_BFloat(), LANES))
    bits = builder.bitcast(values, _WORDS)
    is_odd = builder.and_(builder.lshr(bits, _splat(16)), _splat(1))
    rounded = builder.add(builder.add(bits, _splat(0x7FFF)), is_odd)
    return builder.trunc(builder.lshr(rounded, _splat(16)), ir.VectorType(ir.IntType(16), LANES))
