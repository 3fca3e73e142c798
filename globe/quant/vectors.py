"""Sixteen entries of a path at a time, written as LLVM's vectors, which it turns into what the CPU has.

Sixteen entries of b bits begin at a byte and take 2·b bytes, so that where each one's bits are within them is known
beforehand: one permutation of bytes and one shift bring every state into a lane of its own. Compilers do not find that
by themselves, and fetch the states one by one at a third of the speed.
"""

# numba and llvmlite have no type stubs
# pyright: basic

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from globe.quant.trellis import ADDEND, MAX_WIDTH, MEAN, MULTIPLIER, NUM_STATES

LANES = 16
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
_BYTES, _WORDS, _FLOATS = ir.VectorType(_I8, READ), ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_WORDS, [value] * LANES)


@intrinsic
def decode_groups(typing_context, payload, place, count, width, step, out, at):  # noqa: ARG001
    """Write level · step of `count` times sixteen entries to out[at:], float32, or uint16 that are bits of bfloat16.

    They begin at payload[place], where READ bytes are read for each sixteen. All arrays are flat.
    """
    signature = types.void(payload, types.int64, types.int64, types.int64, types.float32, out, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        payload, place, count, width, step, out, at = arguments
        write = _writer(context, builder, signature.args[0], payload, signature.args[5], out, step)
        for b in _each_width(builder, width):
            with cgutils.for_range(builder, count) as loop:
                here = builder.add(place, builder.mul(loop.index, _I64(2 * b)))
                write(b, here, None, builder.add(at, builder.mul(loop.index, _I64(LANES))))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def decode_last(typing_context, payload, place, begin, width, step, out, at):  # noqa: ARG001
    """The same for the last sixteen of a ring that begins at payload[begin]."""
    signature = types.void(payload, types.int64, types.int64, types.int64, types.float32, out, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        payload, place, begin, width, step, out, at = arguments
        write = _writer(context, builder, signature.args[0], payload, signature.args[5], out, step)
        for b in _each_width(builder, width):
            write(b, place, begin, at)
        return context.get_dummy_value()

    return signature, generate


def _each_width(builder: Any, width: Any) -> Any:
    """Every width in turn, as a constant; what is built meanwhile runs only where it is the right one."""
    end = builder.append_basic_block("end")
    switch = builder.switch(width, end)
    for b in range(1, MAX_WIDTH + 1):
        block = builder.append_basic_block(f"width.{b}")
        switch.add_case(_I64(b), block)
        builder.position_at_end(block)
        yield b
        builder.branch(end)
    builder.position_at_end(end)


def _writer(context: Any, builder: Any, source_type: Any, payload: Any, target_type: Any, out: Any, step: Any) -> Any:
    source = context.make_array(source_type)(context, builder, payload).data
    target = context.make_array(target_type)(context, builder, out).data
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    steps = builder.shuffle_vector(builder.insert_element(undefined, step, _I32(0)), undefined, _splat(0))

    def read(place: Any) -> Any:
        return builder.load(builder.bitcast(builder.gep(source, [place]), _BYTES.as_pointer()), align=1)

    def write(b: int, place: Any, following: Any, at: Any) -> None:
        """Sixteen entries of b bits, whose bytes are at a place, or the first 2·b of them if others follow."""
        needed = [byte for lane in range(LANES) for byte in range(lane * b // 8, lane * b // 8 + 4)]
        here, there = read(place), ir.Constant(_BYTES, ir.Undefined)
        if following is not None:
            there = read(following)
            needed = [byte if byte < 2 * b else READ + byte - 2 * b for byte in needed]
        order = ir.Constant(ir.VectorType(_I32, len(needed)), needed)
        words = builder.bitcast(builder.shuffle_vector(here, there, order), _WORDS)
        shifts = ir.Constant(_WORDS, [lane * b % 8 for lane in range(LANES)])
        states = builder.and_(builder.lshr(words, shifts), _splat(NUM_STATES - 1))
        mixed = builder.add(builder.mul(states, _splat(MULTIPLIER)), _splat(ADDEND))
        values = builder.fmul(builder.sitofp(_levels(context, builder, mixed), _FLOATS), steps)
        if target_type.dtype == types.uint16:
            values = builder.fptrunc(values, ir.VectorType(_BFloat(), LANES))
        where = builder.bitcast(builder.gep(target, [at]), values.type.as_pointer())
        builder.store(values, where, align=target_type.dtype.bitwidth // 8)

    return write


def _levels(context: Any, builder: Any, mixed: Any) -> Any:
    """Sums of the four bytes of each lane, less MEAN."""
    if "+avx512vnni" in context.codegen().magic_tuple()[2]:  # the CPU's features; LLVM does not find this by itself
        kind = ir.FunctionType(_WORDS, [_WORDS] * 3)
        dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(dot, [_splat(-MEAN), mixed, _splat(0x01010101)])
    odd = builder.and_(builder.lshr(mixed, _splat(8)), _splat(0x00FF00FF))
    pairs = builder.add(builder.and_(mixed, _splat(0x00FF00FF)), odd)
    sums = builder.lshr(builder.mul(pairs, _splat(0x00010001)), _splat(16))
    return builder.sub(sums, _splat(MEAN))
