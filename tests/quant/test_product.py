"""Tokens times coded experts, against decoding to float64 and multiplying."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from globe.quant import packing, product, trellis
from globe.quant.banked import BankedExperts, CodedBank
from globe.quant.coded import CodedExperts
from globe.quant.outputs import Outputs
from globe.quant.product import FEW, coded_product, coded_product_transposed, multiply, multiply_sums
from globe.quant.side import OwnRows, SharedRows, parts_of_side

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
COUNTS = [1, 0, FEW + 3, 2, FEW, 40, 0]
"""Tokens of each expert."""
N = 21


def random_experts(
    K: int, width: int | None = None, *, shared: bool = False, scaled: bool = False, E: int = len(COUNTS)
) -> CodedExperts:
    """Experts with N inputs, of any bits whatever, all widths unless one is given."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    if shared:
        costs, scales = (draw(-500, 2500, E), draw(-2000, 2000, N)), (draw(-50, -40, E), draw(-9, 9, N))
        side: OwnRows | SharedRows = SharedRows(
            costs[0].to(torch.int16), costs[1].to(torch.int16), scales[0].to(torch.int16), scales[1].to(torch.int8)
        )
    else:
        widths = draw(1, 17, E, N) if width is None else torch.full((E, N), width)
        widths[widths < trellis.LEAST_WIDTH] = 0
        bases = draw(-50, -40, E)
        exponents = bases[:, None] - draw(0, 31, E, N)
        side = OwnRows.of(widths.to(torch.uint8), exponents.to(torch.int32), bases.to(torch.int16))
    size = int(packing.row_bytes(side.widths(), trellis.path_length(K)).sum())
    outputs = Outputs(draw(-4, 5, E, K).to(torch.int8) if scaled else None)
    return CodedExperts(draw(0, 256, size).to(torch.uint8), side, K, outputs)


def tokens(dtype: torch.dtype = torch.float32, rows: int = sum(COUNTS) + 2, length: int = N) -> tuple[Tensor, Tensor]:
    """Some for every expert, two for none; and where those of each expert end."""
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), torch.tensor(COUNTS).cumsum(0)


def decoded(coded: CodedExperts) -> Tensor:
    """Experts (E, N, K), undone in float64."""
    rows = coded.rows()
    each = (x.flatten() for x in (rows.offsets, rows.widths, rows.steps))
    found = packing.decode(coded.payload, *each, coded.length).view(*rows.widths.shape, -1)
    return coded.outputs.undo(found[..., : coded.num_outputs].double())


def expected(x: Tensor, experts: Tensor) -> Tensor:
    """x (n, N) by experts (E, N, K) float64."""
    out, start = torch.zeros(len(x), experts.shape[2], dtype=torch.float64), 0
    for count, X in zip(COUNTS, experts, strict=True):
        out[start : start + count] = x[start : start + count].double() @ X
        start += count
    return out


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert float((found.double() - wanted).norm()) <= TOLERANCE[dtype] * float(wanted.norm())


@pytest.fixture(params=["numba", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which products are computed on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(trellis, "compiled", lambda: None)
        monkeypatch.setattr(product, "_say_that_it_is_slow", lambda: None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("shared", "scaled"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("K", [5, 12, 13, 29, 48, 131, 272])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_is_what_decoded_experts_give(dtype: torch.dtype, K: int, shared: bool, scaled: bool) -> None:
    coded = random_experts(K, shared=shared, scaled=scaled)
    assert coded.is_sound()
    assert len(coded.side.widths().unique()) >= 15
    x, ends = tokens(dtype)
    found = multiply(x, ends, BankedExperts(coded))
    assert_close(found, expected(x, decoded(coded)), dtype)
    assert bool((found[ends[-1] :] == 0).all())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("width", [0, *range(trellis.LEAST_WIDTH, trellis.MAX_WIDTH + 1)])
@pytest.mark.parametrize("K", [12, 200, 2048])
def test_every_width(width: int, K: int) -> None:
    coded = random_experts(K, width)
    for dtype in (torch.float32, torch.bfloat16):
        x, ends = tokens(dtype)
        assert_close(multiply(x, ends, BankedExperts(coded)), expected(x, decoded(coded)), dtype)


ON_ANY_CPU = """
import torch
from globe.quant import packing, product, trellis
from globe.quant.product import coded_product
from globe.quant.side import parts_of_side
from tests.quant.test_product import N, random_experts

coded = random_experts(272)
decoded = coded.decode()
product._is_fast_in_bfloat16 = lambda: True
ones = torch.eye(N, dtype=torch.bfloat16)
products = coded_product(ones, torch.tensor([0] * 3 + [N] * 4), coded.payload, parts_of_side(coded.side), None, 272)
trellis.compiled = lambda: None
assert torch.equal(decoded, coded.decode())
rows = coded.rows()
wanted = packing.decode(coded.payload, rows.offsets[3], rows.widths[3], rows.steps[3], 272)
torch.testing.assert_close(products, coded.outputs.undo(wanted.bfloat16().float()), rtol=1e-6, atol=1e-6)
"""


def test_the_same_bits_on_a_cpu_without_extensions() -> None:
    settings = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", ON_ANY_CPU], env=settings, cwd=Path(__file__).parents[2], check=True)


def test_bfloat16_by_way_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_is_fast_in_bfloat16", lambda: False)
    coded, (x, ends) = random_experts(131), tokens(torch.bfloat16)
    found = coded_product(x, ends, coded.payload, parts_of_side(coded.side), None, 131)
    assert_close(found, expected(x, decoded(coded)), torch.float32)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_experts_share_is_added(dtype: torch.dtype) -> None:
    codes = torch.randint(-9000, 9000, (len(COUNTS), 3), generator=torch.Generator().manual_seed(2)).to(torch.int16)
    rest, bases = random_experts(29, scaled=True), random_experts(29, E=3)
    whole = decoded(rest) + torch.einsum("em,mnk->enk", codes.double() / 2**12, decoded(bases))
    x, ends = tokens(dtype)
    x.requires_grad_()
    found, (sent, _) = multiply(x, ends, BankedExperts(rest, CodedBank(bases, codes))), tokens(dtype, length=29)
    assert_close(found.detach(), expected(x.detach(), whole), dtype)
    found.backward(sent)
    assert x.grad is not None
    assert_close(x.grad, expected(sent, whole.mT), dtype)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_experts_of_a_token_share_what_it_takes_to_multiply_bases(dtype: torch.dtype) -> None:
    codes = torch.randint(-9000, 9000, (len(COUNTS), 3), generator=torch.Generator().manual_seed(2)).to(torch.int16)
    rest, bases = random_experts(29, scaled=True), random_experts(29, E=3)
    mixtures = torch.einsum("em,mnk->enk", codes.double() / 2**12, decoded(bases))
    bank, top_k = CodedBank(bases, codes), 3
    _, ends = tokens(dtype)
    ends[-1] += -ends[-1] % top_k
    counts = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))
    num_rows = int(ends[-1])
    num_tokens = num_rows // top_k
    x, sent = torch.randn(num_tokens, N).to(dtype).requires_grad_(), torch.randn(num_rows, 29).to(dtype)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(3))
    owners = torch.arange(len(COUNTS)).repeat_interleave(counts)
    chosen = torch.nn.functional.one_hot(order // top_k, num_tokens).double()

    def per_row(rows: Tensor, experts: Tensor) -> Tensor:
        return torch.einsum("in,ink->ik", rows.double(), experts[owners])

    found, rows, whole = multiply(x, ends, BankedExperts(rest, bank), order), x.detach()[order // top_k], decoded(rest)
    assert_close(found.detach(), per_row(rows, whole + mixtures), dtype)
    found.backward(sent)
    assert x.grad is not None
    assert_close(x.grad, chosen.mT @ per_row(sent, (whole + mixtures).mT), dtype)
    weights = torch.rand(num_rows)
    summed = multiply_sums(rows, ends, bank, weights, order, num_tokens)
    wanted = chosen.mT @ (weights.double()[:, None] * per_row(rows, mixtures))
    assert_close(summed.to(dtype), wanted, dtype)


@pytest.mark.usefixtures("way")
def test_no_tokens() -> None:
    coded, ends = random_experts(12), torch.zeros(len(COUNTS), dtype=torch.int64)
    assert multiply(torch.zeros(0, N), ends, BankedExperts(coded)).shape == (0, 12)
    assert bool((multiply(torch.ones(3, N), ends, BankedExperts(coded)) == 0).all())
    bank, order = CodedBank(random_experts(12, E=1), torch.ones(len(COUNTS), 1, dtype=torch.int16)), torch.arange(0)
    assert multiply(torch.zeros(0, N), ends, BankedExperts(coded, bank), order).shape == (0, 12)
    assert multiply_sums(torch.zeros(0, N), ends, bank, torch.zeros(0), order, 0).shape == (0, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_experts_are_decoded_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    coded = random_experts(272)
    x, ends = tokens(dtype)
    monkeypatch.setattr(product, "BLOCK_BYTES", 1)
    assert_close(multiply(x, ends, BankedExperts(coded)), expected(x, decoded(coded)), dtype)


def test_threads_do_not_matter() -> None:
    coded = random_experts(272)
    x, ends = tokens(torch.bfloat16)
    before, found = torch.get_num_threads(), list[Tensor]()
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        found.append(multiply(x, ends, BankedExperts(coded)))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_are_those_of_the_decoded_experts(dtype: torch.dtype) -> None:
    coded = random_experts(29, scaled=True)
    x, ends = tokens(dtype)
    sent, _ = tokens(dtype, length=29)
    x.requires_grad_()
    multiply(x, ends, BankedExperts(coded)).backward(sent)
    assert x.grad is not None
    assert_close(x.grad, expected(sent, decoded(coded).mT), dtype)


@pytest.mark.parametrize(("shared", "scaled"), [(False, True), (True, False)])
def test_pytorch_finds_nothing_wrong_with_the_operations(shared: bool, scaled: bool) -> None:
    coded = random_experts(29, shared=shared, scaled=scaled)
    x, ends = tokens()
    parts = coded.payload, parts_of_side(coded.side), coded.outputs.exponents
    torch.library.opcheck(coded_product, (x.clone().requires_grad_(), ends, *parts, 29))
    torch.library.opcheck(coded_product_transposed, (tokens(length=29)[0], ends, *parts, N, 29))


def test_compiled_without_a_break() -> None:
    coded = random_experts(29)
    x, ends = tokens()
    x.requires_grad_()

    def doubled(x: Tensor, ends: Tensor) -> Tensor:
        return 2 * multiply(2 * x, ends, BankedExperts(coded))

    found = torch.compile(doubled, fullgraph=True, backend="aot_eager")(x, ends)
    torch.testing.assert_close(found, 4 * multiply(x, ends, BankedExperts(coded)))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert_close(gradient, 4 * expected(torch.ones(len(x), 29), decoded(coded).mT), torch.float32)


def test_without_numba_it_says_once_that_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis, "compiled", lambda: None)
    product._say_that_it_is_slow.cache_clear()
    x, ends = tokens()
    with pytest.warns(UserWarning, match="slow; install numba"):
        multiply(x, ends, BankedExperts(random_experts(12)))
    multiply(x, ends, BankedExperts(random_experts(12)))  # warnings are errors here
