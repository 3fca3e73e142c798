from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.bank.factors import Factors
from globe.bank_shape import BankShape

sizes = st.integers(1, 7)


@given(st.builds(BankShape, sizes, sizes, sizes, sizes, sizes))
def test_factors_of_a_shape_compose_to_its_matrices_and_count_its_parameters(shape: BankShape) -> None:
    factors = Factors(torch.zeros(shape.adapters), torch.zeros(shape.codes), torch.zeros(shape.bases), "tanh")
    experts = factors.compose()
    assert experts.shape == shape.matrices
    assert experts.numel() == shape.original_parameters
    stored = sum(factor.numel() for factor in (factors.adapters, factors.codes, factors.bases))
    assert stored == shape.parameters
    assert shape.share == stored / experts.numel()


def test_the_parameters_of_a_bank_are_what_its_formula_says() -> None:
    """E·P·R + M·R·D + E·M."""
    assert BankShape(12, 6, 16, rank=3, num_bases=4).parameters == 12 * 6 * 3 + 4 * 3 * 16 + 12 * 4
