from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from globe.quant import packing, trellis


def random_rows(E: int, N: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Symbols (E, N, length) and widths (E, N), 0 or 2 to 16."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(trellis.LEAST_WIDTH - 1, trellis.MAX_WIDTH + 1, (E, N), generator=generator)
    widths[widths < trellis.LEAST_WIDTH] = 0
    begins = torch.arange(length + 1) * widths[..., None] >> 1
    symbols = torch.randint(0, 256, (E, N, length), generator=generator) % (1 << begins.diff())
    return symbols.to(torch.uint8), widths.to(torch.uint8)


@given(E=st.integers(1, 3), N=st.integers(1, 4), half=st.integers(1, 20), seed=st.integers(0, 99))
def test_what_is_unpacked_is_what_was_packed(E: int, N: int, half: int, seed: int) -> None:
    length = 2 * half
    symbols, widths = random_rows(E, N, length, seed)
    payload = packing.pack(symbols, widths)
    assert payload.dtype == torch.uint8
    assert len(payload) == sum(-(-width * half // 8) for width in widths.flatten().tolist())
    torch.testing.assert_close(packing.unpack(payload, widths, length), symbols, rtol=0, atol=0)


def test_bits_lie_where_the_format_says() -> None:
    symbols, widths = random_rows(4, 5, 22, seed=5)
    assert len(widths.unique()) >= 10
    payload = packing.pack(symbols, widths).tolist()
    offsets, place = packing.row_offsets(widths, 22), 0
    for e in range(4):
        for i in range(5):
            width = int(widths[e, i])
            assert int(offsets[e, i]) == place
            for t in range(22):
                begin, end = t * width >> 1, (t + 1) * width >> 1
                bits = [(payload[place + j // 8] >> (j % 8)) & 1 for j in range(begin, end)]
                assert int(symbols[e, i, t]) == sum(bit << k for k, bit in enumerate(bits))
            place += -(-11 * width // 8)
    assert place == len(payload)


@given(half=st.integers(trellis.LOG_STATES // 2, 25), seed=st.integers(0, 99))
def test_decoded_rows_are_levels_times_steps(half: int, seed: int) -> None:
    length = 2 * half
    symbols, widths = random_rows(2, 3, length, seed)
    steps = torch.rand(6, generator=torch.Generator().manual_seed(seed))
    found = packing.decode(
        packing.pack(symbols, widths), packing.row_offsets(widths, length).flatten(), widths.flatten(), steps, length
    )
    for row, width, step, decoded in zip(symbols.view(6, -1), widths.flatten().tolist(), steps, found, strict=True):
        wanted = torch.zeros(length)
        if width:
            wanted = trellis.levels()[trellis.states(row, width)].float() * step
        torch.testing.assert_close(decoded, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("length", [12, 14, 48, 130])
def test_numba_and_torch_decode_the_same_bits(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    symbols, widths = random_rows(5, 9, length, seed=1)
    arguments = (
        packing.pack(symbols, widths),
        packing.row_offsets(widths, length).flatten(),
        widths.flatten(),
        torch.rand(45, generator=torch.Generator().manual_seed(0)),
        length,
    )
    fast = packing.decode(*arguments)
    monkeypatch.setattr(trellis, "compiled", lambda: None)
    torch.testing.assert_close(fast, packing.decode(*arguments), rtol=0, atol=0)


def test_rows_come_by_width_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK", 20)
    widths = torch.tensor([3, 0, 3, 2, 3])
    found = [(width, rows.tolist()) for width, rows in packing.rows_by_width(widths, 10)]
    assert found == [(2, [3]), (3, [0, 2]), (3, [4])]
