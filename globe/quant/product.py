"""Tokens times coded experts, which are never stored decoded: an operation that torch.compile and autograd see.

On the CPU, numba decodes into the cache what is multiplied next. Few tokens of an expert are multiplied by a few rows
at a time, while these are in the first cache; for more, a block of outputs is decoded in the tokens' own precision, and
left to the matrix product of PyTorch. Elsewhere, and without numba, experts are decoded in torch.
"""

# what `custom_op` returns has no type stubs
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from globe.quant import packing, trellis
from globe.quant.banked import CODE_UNIT, BankedExperts
from globe.quant.coded import CodedExperts, PackedRows
from globe.quant.outputs import Outputs
from globe.quant.side import parts_of_side, side_of_parts
from globe.quant.threads import run_all

FEW = 4
"""Tokens of an expert that are multiplied row by row; measured."""
BLOCK_BYTES = 4 * 2**20
"""Of what is decoded at a time for more: well within the last cache."""
_LANES = 64
"""Blocks of outputs are multiples of this many."""


def multiply(x: Tensor, ends: Tensor, experts: BankedExperts) -> Tensor:
    """Every expert's rows of x times the expert: (n, N) -> (n, K), in the dtype of x; differentiable in x.

    ends (E,) int: rows up to ends[0] belong to the first expert, from there to ends[1] to the second, …, and what is
    behind the last becomes 0. The bases of a bank are multiplied by all rows, and their products mixed.
    """
    E, places = len(ends), torch.arange(len(x)).to(ends)
    owners = torch.searchsorted(ends, places, right=True)
    out = _product(x, ends, experts.rest, owners.clamp_max(E - 1))
    if experts.bank is None:
        return out.to(x.dtype)
    bases, codes = experts.bank.bases, experts.bank.codes
    mixtures = torch.where(owners[:, None] < E, codes[owners.clamp_max(E - 1)] * CODE_UNIT, 0)
    for base, mixture in enumerate(mixtures.unbind(1)):
        whole = len(x) * (torch.arange(codes.shape[1]) >= base).to(ends)
        out = out + mixture[:, None] * _product(x, whole, bases)
    return out.to(x.dtype)


def _product(x: Tensor, ends: Tensor, coded: CodedExperts, owners: Tensor | None = None) -> Tensor:
    """In float32 at least; owners (n,): the experts of the rows of x."""
    out = coded_product(x, ends, coded.payload, parts_of_side(coded.side), coded.num_outputs)
    return coded.outputs.undo_products(out.to(torch.promote_types(x.dtype, torch.float32)), owners)


@torch.library.custom_op(
    "globe::coded_product",
    mutates_args=(),
    schema="(Tensor x, Tensor ends, Tensor payload, Tensor[] side, int num_outputs) -> Tensor",
)
def coded_product(x: Tensor, ends: Tensor, payload: Tensor, side: Sequence[Tensor], num_outputs: int) -> Tensor:
    """`multiply` without a bank, with the parts of what is coded."""
    coded = CodedExperts(payload, side_of_parts(side), num_outputs, Outputs())
    out = x.new_zeros(len(x), num_outputs)
    runs = _runs(ends)
    if not runs:
        return out
    rows = coded.rows(torch.tensor([expert for expert, _, _ in runs], device=payload.device))
    if payload.device.type == "cpu" and trellis.compiled() is not None and x.dtype != torch.float64:
        sizes = [stop - start for _, start, stop in runs]
        _multiply_compiled(x[: runs[-1][2]], sizes, coded, rows, out[: runs[-1][2]])
    else:
        for (_, start, stop), X in zip(runs, _decoded(coded, rows, x.dtype), strict=True):
            out[start:stop] = x[start:stop] @ X
    return out


@coded_product.register_fake
def _(x: Tensor, ends: Tensor, payload: Tensor, side: Sequence[Tensor], num_outputs: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], num_outputs)


@torch.library.custom_op(
    "globe::coded_product_transposed",
    mutates_args=(),
    schema="(Tensor y, Tensor ends, Tensor payload, Tensor[] side, int num_inputs, int num_outputs) -> Tensor",
)
def coded_product_transposed(
    y: Tensor, ends: Tensor, payload: Tensor, side: Sequence[Tensor], num_inputs: int, num_outputs: int
) -> Tensor:
    """Every expert's rows of y times the transposed expert: (n, K) -> (n, N), otherwise as `multiply`."""
    coded = CodedExperts(payload, side_of_parts(side), num_outputs, Outputs())
    out = y.new_zeros(len(y), num_inputs)
    runs = _runs(ends)
    if runs:
        rows = coded.rows(torch.tensor([expert for expert, _, _ in runs], device=payload.device))
        for (_, start, stop), X in zip(runs, _decoded(coded, rows, y.dtype), strict=True):
            out[start:stop] = y[start:stop] @ X.mT
    return out


@coded_product_transposed.register_fake
def _(
    y: Tensor,
    ends: Tensor,  # noqa: ARG001
    payload: Tensor,  # noqa: ARG001
    side: Sequence[Tensor],  # noqa: ARG001
    num_inputs: int,
    num_outputs: int,  # noqa: ARG001
) -> Tensor:
    return y.new_empty(y.shape[0], num_inputs)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, ends, payload, side, ctx.num_outputs = inputs
    ctx.num_inputs = x.shape[1]
    ctx.save_for_backward(ends, payload, *side)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ends, payload, *side = ctx.saved_tensors
    found = coded_product_transposed(grad, ends, payload, side, ctx.num_inputs, ctx.num_outputs)
    return found, None, None, [None] * len(side), None


coded_product.register_autograd(_backward, setup_context=_keep_for_backward)


def _runs(ends: Tensor) -> list[tuple[int, int, int]]:
    """The experts that have rows, with the first of these and the one behind the last."""
    stops = cast(list[int], ends.tolist())
    starts = [0, *stops[:-1]]
    return [(e, start, stop) for e, (start, stop) in enumerate(zip(starts, stops, strict=True)) if stop > start]


def _decoded(coded: CodedExperts, rows: PackedRows, dtype: torch.dtype) -> Iterator[Tensor]:
    """The experts of these rows, (N, K) each, as many at a time as `packing.CHUNK` holds."""
    if trellis.compiled() is None:
        _say_that_it_is_slow()
    size = max(1, packing.CHUNK // (rows.widths.shape[1] * coded.length))
    for offsets, widths, steps in zip(
        rows.offsets.split(size), rows.widths.split(size), rows.steps.split(size), strict=True
    ):
        found = packing.decode(coded.payload, offsets.flatten(), widths.flatten(), steps.flatten(), coded.length)
        yield from found[:, : coded.num_outputs].to(dtype).unflatten(0, offsets.shape)


@functools.cache
def _say_that_it_is_slow() -> None:
    warnings.warn("coded experts are decoded in PyTorch, which is slow; install numba for speed", stacklevel=2)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Tokens of one expert, with all that numba has to know."""

    x: Tensor
    """(m, N) bfloat16 or float32."""
    rows: tuple[Any, Any, Any]
    """Offsets, widths and steps, (N,) each."""
    out: Tensor
    """(m, K), where the products go."""


def _multiply_compiled(x: Tensor, sizes: Sequence[int], coded: CodedExperts, rows: PackedRows, out: Tensor) -> None:
    x = x.detach() if x.dtype == torch.bfloat16 else x.detach().float()
    packed = zip(rows.offsets.numpy(), rows.widths.numpy(), rows.steps.numpy(), strict=True)
    runs = [_Run(*parts) for parts in zip(x.split(sizes), packed, out.split(sizes), strict=True)]
    few, many = ([run for run in runs if (len(run.x) <= FEW) == is_few] for is_few in (True, False))
    payload, kernels = coded.payload.contiguous().numpy(), trellis.compiled()
    _multiply_few(kernels, few, payload, coded.length)
    _multiply_many(kernels, many, payload, coded.length)


def _multiply_few(kernels: Any, runs: Sequence[_Run], payload: Any, length: int) -> None:
    """All experts at once, and their outputs in blocks where there are more threads."""
    sums = [torch.zeros(run.out.shape) for run in runs]
    tasks: list[Callable[[], None]] = []
    for run, total in zip(runs, sums, strict=True):
        K = total.shape[1]
        size = min(K, _up_to_lanes(K * len(runs) // torch.get_num_threads()))
        x, into = run.x.float().contiguous().numpy(), total.numpy()

        def multiply_block(first: int, last: int, x: Any = x, into: Any = into, run: _Run = run) -> None:
            decoded = torch.empty(kernels.ROWS, last - first).numpy()  # of torch, for it begins at a line of the cache
            kernels.multiply_block(x, payload, *run.rows, length, first, last, decoded, into)

        tasks += [functools.partial(multiply_block, first, min(first + size, K)) for first in range(0, K, size)]
    run_all(tasks)
    for run, total in zip(runs, sums, strict=True):
        run.out.copy_(total)


def _multiply_many(kernels: Any, runs: Sequence[_Run], payload: Any, length: int) -> None:
    """One expert after the other, decoded by all threads and multiplied by all threads."""
    if not runs:
        return
    N, K = runs[0].x.shape[1], runs[0].out.shape[1]
    size = min(K, _up_to_lanes(BLOCK_BYTES // (N * runs[0].x.itemsize)))
    buffer, part = runs[0].x.new_empty(N * size), -(-N // torch.get_num_threads())
    for run in runs:
        for first in range(0, K, size):
            last = min(first + size, K)
            X = buffer[: N * (last - first)].view(N, -1)
            into = X.view(torch.uint16).numpy() if X.dtype == torch.bfloat16 else X.numpy()

            def decode(some: slice, block: tuple[int, int] = (first, last), into: Any = into, run: _Run = run) -> None:
                kernels.decode_block(payload, *(x[some] for x in run.rows), length, *block, into[some])

            run_all([functools.partial(decode, slice(start, start + part)) for start in range(0, N, part)])
            run.out[:, first:last] = run.x @ X


def _up_to_lanes(size: int) -> int:
    """The next number of outputs that fills vectors."""
    return max(1, -(-size // _LANES)) * _LANES
