from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.quant import trellis
from globe.quant.scales import PER_OCTAVE, fit_exponents, nearest_exponents, scales, steps


@given(exponent=st.integers(-PER_OCTAVE * 126, PER_OCTAVE * 127))
def test_scales_are_the_nearest_float32(exponent: int) -> None:
    found = scales(torch.tensor([exponent], dtype=torch.int32))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(2.0 ** (exponent / PER_OCTAVE), rel=1e-7)


@given(exponent=st.integers(-300, 300))
def test_exponents_are_found_again(exponent: int) -> None:
    grid = torch.tensor([exponent], dtype=torch.int32)
    for off in (0.96, 1.0, 1.04):
        assert nearest_exponents(scales(grid) * off).tolist() == [exponent]


def test_zero_has_a_scale() -> None:
    assert bool(scales(nearest_exponents(torch.zeros(1))).isfinite().all())


def test_steps_follow_the_gain_of_the_width() -> None:
    widths = torch.arange(trellis.LEAST_WIDTH, trellis.MAX_WIDTH + 1, dtype=torch.uint8)
    found = steps(torch.full((len(widths),), 2 * PER_OCTAVE, dtype=torch.int32), widths)
    wanted = torch.tensor([4 * gain / trellis.RMS for gain in trellis.GAIN[trellis.LEAST_WIDTH :]])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_normal_rows_keep_the_scale_of_their_root_mean_square() -> None:
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).clamp(-2.5, 2.5)
    widths = torch.full((200,), 6, dtype=torch.uint8)
    wanted = nearest_exponents(rows.square().mean(1).sqrt())
    torch.testing.assert_close(fit_exponents(rows, widths), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("width", [8, 12])
def test_rows_with_a_large_entry_lose_less_by_a_larger_scale(width: int) -> None:
    rows = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    rows[:, 7] = 7.0
    widths = torch.full((20,), width, dtype=torch.uint8)

    def error(exponents: torch.Tensor) -> float:
        step = steps(exponents, widths)[:, None]
        _, states = trellis.encode(rows / step, width)
        return float((trellis.levels()[states] * step - rows).square().mean())

    plain = nearest_exponents(rows.square().mean(1).sqrt())
    fitted = fit_exponents(rows, widths)
    assert bool((fitted >= plain).all())
    assert error(fitted) < 0.6 * error(plain)
    assert error(fitted) < 1.5 * min(error(plain + k) for k in range(10))


def test_rows_without_bits_are_left_alone() -> None:
    rows = torch.zeros(1, 16)
    rows[0, 0] = 1.0
    assert (
        fit_exponents(rows, torch.zeros(1, dtype=torch.uint8)).tolist()
        == nearest_exponents(torch.tensor([0.25])).tolist()
    )
