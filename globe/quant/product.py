"""Tokens times coded experts, which are never stored decoded: an operation that torch.compile and autograd see.

On the CPU, numba decodes into the cache what is multiplied next. Few tokens of an expert are multiplied by a few rows
at a time, while these are in the first cache; for more, a block of outputs is decoded, in bfloat16 where that is fast,
and left to the matrix product of PyTorch, which each thread runs by itself: what one core has written is slow to read
for another. Outputs are rotated back in place. On a GPU, Triton decodes in registers. Elsewhere, and without numba,
experts are decoded in torch.
"""

# what `custom_op` returns has no type stubs
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from globe.quant import packing, trellis
from globe.quant.banked import CODE_UNIT, BankedExperts, CodedBank
from globe.quant.coded import CodedExperts, PackedRows
from globe.quant.outputs import Outputs, block_length
from globe.quant.side import parts_of_side, side_of_parts
from globe.quant.threads import run_all

FEW = 6
"""Tokens of an expert that are multiplied row by row; measured."""
SCRATCH = 6 * 2**10
"""Numbers that these take together with their sums: they fit the first cache."""
BLOCK_BYTES = 4 * 2**20
"""Of what a thread decodes at a time for more."""
_LANES = 64
"""Blocks of outputs are multiples of this many."""


def multiply(x: Tensor, ends: Tensor, experts: BankedExperts, order: Tensor | None = None) -> Tensor:
    """Every expert's rows times the expert: (n, N) -> (n, K), in the dtype of x; differentiable in x.

    ends (E,) int: rows up to ends[0] belong to the first expert, from there to ends[1] to the second, …, and what is
    behind the last becomes 0. The rows are those of x, or, with order (n,), of T tokens x (T, N) of which each has
    n / T experts: row i is the choice order[i] of all (T, n / T). The bases of a bank are multiplied by the tokens,
    whose experts share these products, and mix them.
    """
    out = _product(x if order is None else x[order // max(1, len(order) // max(1, len(x)))], ends, experts.rest)
    if (bank := experts.bank) is not None:
        products = _product_with_bases(x.expand(bank.codes.shape[1], -1, -1), bank).transpose(0, 1)
        mixed = _by_token(_mixtures(bank, ends, len(out)), order, len(x)).to(products) @ products
        out = out + (mixed.flatten(0, 1) if order is None else mixed.flatten(0, 1)[order])
    return out.to(x.dtype)


def multiply_sums(x: Tensor, ends: Tensor, bank: CodedBank, weights: Tensor, order: Tensor, num_tokens: int) -> Tensor:
    """Sums over the experts of each token of weight times row times the expert's mixture of the bases: (T, K).

    Rows are mixed before they are multiplied, so that a token's experts share the products. x (n, N), ends and order as
    in `multiply`, weights (n,); differentiable in x and weights; float32 at least.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    mixtures = _by_token(_mixtures(bank, ends, len(x)).to(exact) * weights[:, None], order, num_tokens)
    mixed = (mixtures.mT @ _by_token(x, order, num_tokens).to(exact)).to(x.dtype)
    return _product_with_bases(mixed.transpose(0, 1), bank).sum(0)


def _mixtures(bank: CodedBank, ends: Tensor, num_rows: int) -> Tensor:
    """By what every row's expert multiplies the bases, (num_rows, M) float32; 0 behind the last end."""
    is_someones = (torch.arange(num_rows).to(ends) < ends[-1])[:, None]
    return torch.where(is_someones, bank.codes[_owners(ends, num_rows)] * CODE_UNIT, 0)


def _by_token(rows: Tensor, order: Tensor | None, num_tokens: int) -> Tensor:
    """Rows (n, ·) in the order of the tokens' choices, (T, n / T, ·)."""
    if order is not None:
        rows = torch.zeros_like(rows).index_copy(0, order, rows)
    return rows.view(num_tokens, len(rows) // max(1, num_tokens), rows.shape[1])


def _product_with_bases(x: Tensor, bank: CodedBank) -> Tensor:
    """Rows (M, T, N) for each base, times the base: (M, T, K)."""
    ends = x.shape[1] * torch.arange(1, len(x) + 1, device=x.device)
    return _product(x.flatten(0, 1), ends, bank.bases).view(*x.shape[:2], bank.bases.num_outputs)


def _product(x: Tensor, ends: Tensor, coded: CodedExperts) -> Tensor:
    """By the operation where somebody sees it: the dispatcher costs a tenth of the products of a token."""
    is_differentiated = torch.is_grad_enabled() and x.requires_grad
    if type(x) is Tensor and not (x.is_meta or is_differentiated or torch.compiler.is_compiling()):
        return _multiply_rest(x, ends, coded)
    side = parts_of_side(coded.side)
    return coded_product(x, ends, coded.payload, side, coded.outputs.exponents, coded.num_outputs)


def _multiply_rest(x: Tensor, ends: Tensor, coded: CodedExperts) -> Tensor:
    out = x.new_zeros(len(x), coded.num_outputs, dtype=torch.promote_types(x.dtype, torch.float32))
    if x.is_cuda and x.dtype != torch.float64 and (on_gpu := _triton()) is not None:
        on_gpu.multiply(x, ends, coded, out)
        return coded.outputs.undo_products(out, _owners(ends, len(x)))
    runs = _runs(ends)
    if not runs:
        return out
    experts = torch.tensor([expert for expert, _, _ in runs], device=coded.payload.device)
    rows, taken = coded.rows(experts), runs[-1][2]
    if out.device.type == "cpu" and trellis.compiled() is not None and x.dtype != torch.float64:
        starts = [start for _, start, _ in runs] + [taken]
        _Compiled(coded, experts, rows, starts, x[:taken].detach(), out[:taken]).run()
        return out
    for (_, start, stop), X in zip(runs, _decoded(coded, rows, x.dtype), strict=True):
        out[start:stop] = x[start:stop] @ X
    return coded.outputs.undo_products(out, _owners(ends, len(x)))


@torch.library.custom_op(
    "globe::coded_product",
    mutates_args=(),
    schema="(Tensor x, Tensor ends, Tensor payload, Tensor[] side, Tensor? exponents, int num_outputs) -> Tensor",
)
def coded_product(
    x: Tensor, ends: Tensor, payload: Tensor, side: Sequence[Tensor], exponents: Tensor | None, num_outputs: int
) -> Tensor:
    """`multiply` without a bank, in float32 at least, with the parts of what is coded."""
    return _multiply_rest(x, ends, CodedExperts(payload, side_of_parts(side), num_outputs, Outputs(exponents)))


@coded_product.register_fake
def _(
    x: Tensor,
    ends: Tensor,  # noqa: ARG001
    payload: Tensor,  # noqa: ARG001
    side: Sequence[Tensor],  # noqa: ARG001
    exponents: Tensor | None,  # noqa: ARG001
    num_outputs: int,
) -> Tensor:
    return x.new_empty(x.shape[0], num_outputs, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op(
    "globe::coded_product_transposed",
    mutates_args=(),
    schema="(Tensor y, Tensor ends, Tensor payload, Tensor[] side, Tensor? exponents, int num_inputs, int num_outputs)"
    " -> Tensor",
)
def coded_product_transposed(
    y: Tensor,
    ends: Tensor,
    payload: Tensor,
    side: Sequence[Tensor],
    exponents: Tensor | None,
    num_inputs: int,
    num_outputs: int,
) -> Tensor:
    """Every expert's rows of y times the transposed expert: (n, K) -> (n, N), otherwise as `coded_product`."""
    coded = CodedExperts(payload, side_of_parts(side), num_outputs, Outputs(exponents))
    out = y.new_zeros(len(y), num_inputs)
    runs = _runs(ends)
    if runs:
        y = coded.outputs.undo_products_transposed(y, _owners(ends, len(y)))
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
    exponents: Tensor | None,  # noqa: ARG001
    num_inputs: int,
    num_outputs: int,  # noqa: ARG001
) -> Tensor:
    return y.new_empty(y.shape[0], num_inputs)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, ends, payload, side, exponents, ctx.num_outputs = inputs
    ctx.num_inputs, ctx.dtype = x.shape[1], x.dtype
    ctx.save_for_backward(ends, payload, exponents, *side)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ends, payload, exponents, *side = ctx.saved_tensors
    found = coded_product_transposed(grad, ends, payload, side, exponents, ctx.num_inputs, ctx.num_outputs)
    return found.to(ctx.dtype), None, None, [None] * len(side), None, None


coded_product.register_autograd(_backward, setup_context=_keep_for_backward)


def _owners(ends: Tensor, num_rows: int) -> Tensor:
    """Whose each row is, (num_rows,): the last expert's, too, behind the last end."""
    return torch.searchsorted(ends, torch.arange(num_rows).to(ends), right=True).clamp_max(len(ends) - 1)


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
def _triton() -> Any:
    """`triton_product`, or None without Triton."""
    try:
        from globe.quant import triton_product
    except ImportError:
        return None
    return triton_product


@functools.cache
def _say_that_it_is_slow() -> None:
    warnings.warn("coded experts are decoded in PyTorch, which is slow; install numba for speed", stacklevel=2)


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A product by numba, of experts that have rows each."""

    coded: CodedExperts
    experts: Tensor
    """(R,): those that have rows, R runs of them."""
    rows: PackedRows
    """Of these experts."""
    starts: Sequence[int]
    """R + 1: where the rows of each begin, and where those of the last end."""
    x: Tensor
    """(n, N)."""
    out: Tensor
    """(n, K) float32, zeros, where the products go."""

    def run(self) -> None:
        sizes = [stop - start for start, stop in itertools.pairwise(self.starts)]
        few, many = ([run for run, size in enumerate(sizes) if (size <= FEW) == is_few] for is_few in (True, False))
        if few:
            self._multiply_few(few, max(sizes[run] for run in few))
        if many:
            self._multiply_many(many)
        self._rotate_back(sizes)

    def _multiply_few(self, runs: Sequence[int], most: int) -> None:
        """All experts with few rows, at most so many, at once; their outputs in blocks that suit cache and threads."""
        rows, K = trellis.compiled().ROWS, self.out.shape[1]
        num_blocks = max(-(-K * (rows + most) // SCRATCH), -(-torch.get_num_threads() // len(runs)))
        part, x = _up_to_lanes(-(-K // num_blocks)), self.x.float()
        if x.shape[1] % rows:
            x = torch.nn.functional.pad(x, (0, -x.shape[1] % rows))
        fields = {"x": x, "stride": x.shape[1], "most": most}
        fields |= {"runs": torch.tensor(runs), "starts": torch.tensor(self.starts)}
        self._job(num_tasks=len(runs) * -(-K // part), part=part, **fields).run("multiply")

    def _multiply_many(self, runs: Sequence[int]) -> None:
        """Each thread decodes a block of an expert's outputs, and multiplies it while it is in the thread's cache."""
        x = self.x if self.x.dtype == torch.bfloat16 and _is_fast_in_bfloat16() else self.x.float()
        N, K = x.shape[1], self.out.shape[1]
        size = min(K, _up_to_lanes(BLOCK_BYTES // (N * x.itemsize)))
        starts = self.starts
        payload, decode_block = self.coded.payload.contiguous().numpy(), trellis.compiled().decode_block
        packed = [x.numpy() for x in (self.rows.offsets, self.rows.widths, self.rows.steps)]
        buffers: list[Tensor] = []

        @torch.inference_mode()  # other threads do not inherit it
        def multiply_block(run: int, first: int) -> None:
            mine, last = slice(starts[run], starts[run + 1]), min(first + size, K)
            buffer = buffers.pop() if buffers else x.new_empty(N * size)
            X = buffer[: N * (last - first)].view(N, -1)
            into = X.view(torch.uint16).numpy() if X.dtype == torch.bfloat16 else X.numpy()
            decode_block(payload, *(x[run] for x in packed), self.coded.length, first, last, into)
            self.out[mine, first:last] = x[mine] @ X
            buffers.append(buffer)

        run_all([functools.partial(multiply_block, run, first) for run in runs for first in range(0, K, size)])

    def _rotate_back(self, sizes: Sequence[int]) -> None:
        num_rows, K, part = *self.out.shape, 4
        factors = self.coded.outputs.factors(self.experts, K)
        owners = torch.tensor([min(run, len(factors) - 1) for run, size in enumerate(sizes) for _ in range(size)])
        fields = {"factors": factors, "owners": owners, "num_rows": num_rows, "block": block_length(K)}
        self._job(num_tasks=-(-num_rows // part), part=part, **fields).run("rotate_back")

    def _job(self, **fields: Tensor | int) -> Any:
        common = {
            "payload": self.coded.payload,
            "num_bytes": len(self.coded.payload),
            "offsets": self.rows.offsets,
            "widths": self.rows.widths,
            "steps": self.rows.steps,
            "num_inputs": self.x.shape[1],
            "length": self.coded.length,
            "out": self.out,
            "num_outputs": self.out.shape[1],
        }
        return trellis.compiled().Job(**common, **fields)


@functools.cache
def _is_fast_in_bfloat16() -> bool:
    """Whether torch's products are; with AVX2 and no more they take several times what they take in float32."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def _up_to_lanes(size: int) -> int:
    """The next number of outputs that fills vectors."""
    return max(1, -(-size // _LANES)) * _LANES
