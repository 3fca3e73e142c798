from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from globe.bank_shape import BankShape
from globe.errors import SettingsError
from globe.plan.budget import Bits, Keep, Ratios


@given(
    num_matrices=st.integers(1, 400),
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    keep=st.floats(0.001, 0.999),
)
def test_a_chosen_shape_stays_within_the_budget_or_the_range_is_named(
    num_matrices: int, rows: int, columns: int, keep: float
) -> None:
    matrices, total = (num_matrices, rows, columns), num_matrices * rows * columns
    if keep < (num_matrices * rows + columns + num_matrices) / total:
        with pytest.raises(SettingsError, match="out of reach"):
            Keep(keep).shape_for(matrices)
        return
    shape = Keep(keep).shape_for(matrices)
    assert shape.matrices == matrices
    assert 1 <= shape.rank <= rows
    assert 1 <= shape.num_bases <= num_matrices
    assert shape.parameters <= keep * total * (1 + 1e-9)


def test_real_shapes_use_nearly_all_of_the_budget() -> None:
    for matrices in ((384, 768, 2048), (192, 1024, 2048), (180, 1408, 2048), (24, 14336, 4096)):
        for keep in (0.75, 0.5, 0.35):
            assert 0.98 * keep < Keep(keep).shape_for(matrices).share <= keep


def test_ratios_set_rank_and_bases_directly() -> None:
    assert Ratios(0.5, 0.25).shape_for((12, 6, 16)) == BankShape(12, 6, 16, rank=3, num_bases=3)
    assert Ratios(0.01, 0.01).shape_for((12, 6, 16)) == BankShape(12, 6, 16, rank=1, num_bases=1)


def test_bits_are_an_eighth_as_many_bytes() -> None:
    assert Bits(2.5).num_bytes(1000) == 312


@pytest.mark.parametrize("share", [0, -0.5, 1, 1.2, float("nan")])
def test_a_share_of_all_or_of_nothing_is_none(share: float) -> None:
    with pytest.raises(SettingsError, match=r"keep is .*; it must be above 0 and below 1"):
        Keep(share)
