from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.bank.linalg import cholesky_of_inverse
from globe.bank.rounding import (
    CLIP,
    GROUP,
    decode,
    encode,
    encode_with_feedback,
    group_length,
    num_bytes,
    num_groups,
    round_nearest,
    value,
)
from globe.terms import BITS


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_even_and_symmetric_but_for_the_zero_of_eight_bits(bits: int) -> None:
    found = levels(bits).double()
    assert len(found) == 2**bits
    torch.testing.assert_close(found.diff(), torch.full_like(found[1:], float(found[1] - found[0])), rtol=1e-5, atol=0)
    assert found[-1] == 1
    if bits == 8:
        assert found[128] == 0
    else:
        torch.testing.assert_close(found, -found.flip(0), rtol=0, atol=0)


def test_eight_bits_hold_zero_and_the_largest_entry() -> None:
    x = torch.tensor([[0.0, 1.0, -0.25, 0.5]])
    found = decode(encode(x, 8), 4, 8)
    assert found[0, 0] == 0
    torch.testing.assert_close(found, x, rtol=0, atol=0.01)


def levels(bits: int) -> torch.Tensor:
    return value(torch.arange(2**bits).float(), torch.ones(()), bits)


@given(
    bits=st.sampled_from(BITS),
    columns=st.integers(1, 3 * GROUP),
    octave=st.integers(-20, 6),
    seed=st.integers(0, 10),
)
def test_what_is_decoded_is_what_rounding_gave(bits: int, columns: int, octave: int, seed: int) -> None:
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**octave
    encoded = encode(x, bits)
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (2, 3, num_bytes(columns, bits))
    whole = decode(encoded, columns, bits)
    assert torch.equal(whole, round_nearest(x, bits))
    middle = columns // 2 // 8 * 8
    parts = [decode(encoded, columns, bits, part) for part in (slice(0, middle), slice(middle, columns))]
    assert torch.equal(torch.cat(parts, dim=-1), whole)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12])
def test_what_is_smaller_than_all_levels_becomes_zero(bits: int, scale: float) -> None:
    """The least level is 2^-24 or so: rows of far smaller entries would become that, and be wrong a thousandfold."""
    x = scale * torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    assert not round_nearest(x, bits).any()
    encoded = encode_with_feedback(x, torch.eye(40).expand(2, 40, 40), bits)
    assert not decode(encoded, 40, bits).any()


@given(columns=st.integers(1, 1000))
def test_groups_cover_a_row_and_are_no_longer_than_allowed(columns: int) -> None:
    length, count = group_length(columns), num_groups(columns)
    assert length <= GROUP + 7
    assert (count - 1) * length < columns <= count * length


@pytest.mark.parametrize("bits", BITS)
def test_every_entry_goes_to_the_level_nearest_to_it(bits: int) -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    steps = 8 * (CLIP[bits] * x.abs().amax(-1)).log2()
    scale = 2 ** ((steps.ceil() if bits == 8 else steps.round()) / 8)
    grid = levels(bits) * scale[:, None]  # (row, level)
    nearest = (x[..., None] - grid[:, None]).abs().amin(-1)
    torch.testing.assert_close((x - round_nearest(x, bits)).abs(), nearest, rtol=1e-4, atol=1e-6)


def test_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 200)
    x[0, :100] = 1.0
    for bits in BITS:
        assert torch.equal(decode(encode(x, bits), 200, bits)[1], x[1])


def test_scales_off_the_range_are_held_at_its_ends() -> None:
    for bits in BITS:
        assert decode(encode(torch.full((1, 8), 1e6), bits), 8, bits).isfinite().all()
        assert decode(encode(torch.full((1, 8), 1e-12), bits), 8, bits).abs().max() < 1e-5


def feedback_naive(x: torch.Tensor, gram: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a row one column after the other, the later ones solved for anew each time; one scale for the row."""
    table = levels(bits).double()
    scale = 2.0 ** (round((math.log2(CLIP[bits] * x.abs().max()) + 24) * 8) / 8 - 24)
    rounded, wanted = x.clone(), x.clone()
    for column in range(len(x)):
        rounded[column] = table[(wanted[column] / scale - table).abs().argmin()] * scale
        done, rest = slice(0, column + 1), slice(column + 1, None)
        wanted[rest] = x[rest] - torch.linalg.solve(gram[rest, rest], gram[rest, done] @ (rounded - x)[done])
    return rounded


@pytest.mark.parametrize("bits", [3, 4])
def test_feedback_equals_solving_for_the_later_columns_anew(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    root = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    gram = root @ root.mT
    found = decode(encode_with_feedback(x, gram, bits), 6, bits)
    for expert in range(2):
        for row in range(3):
            expected = feedback_naive(x[expert, row], gram[expert], bits)
            torch.testing.assert_close(found[expert, row].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_feedback_loses_less_than_rounding(bits: int) -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(3, 40, 60, generator=generator) @ torch.randn(60, 200, generator=generator)
    x, gram = torch.randn(3, 8, 40, generator=generator), features @ features.mT

    def loss(rounded: torch.Tensor) -> torch.Tensor:
        return ((x - rounded) @ gram * (x - rounded)).sum()

    with_feedback = loss(decode(encode_with_feedback(x, gram, bits), 40, bits))
    assert with_feedback < 0.8 * loss(round_nearest(x, bits))


def test_the_inverse_has_the_factor() -> None:
    root = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gram = root @ root.mT
    upper = cholesky_of_inverse(gram, ridge=0.0)
    torch.testing.assert_close(upper.mT @ upper, torch.linalg.inv(gram))
    assert torch.equal(upper, upper.triu())
    singular = torch.ones(1, 4, 4)
    assert cholesky_of_inverse(singular).isfinite().all()
    with pytest.raises(ValueError, match="not positive"):
        cholesky_of_inverse(torch.full((1, 2, 2), torch.nan))
