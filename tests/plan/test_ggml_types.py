from __future__ import annotations

import gguf
import pytest

from globe.plan.ggml_types import types_for


def bits(name: str) -> float:
    """As the package gguf knows the type."""
    found = {each.name.lower(): each for each in gguf.GGMLQuantizationType}[name.lower()]
    block, num_bytes = gguf.GGML_QUANT_SIZES[found]
    return 8 * num_bytes / block


@pytest.mark.parametrize(("num_inputs", "block"), [(768, 256), (256, 256), (2880, 32), (64, 32)])
def test_sizes_are_those_of_gguf_and_every_type_pays(num_inputs: int, block: int) -> None:
    types = types_for(num_inputs)
    assert {each.block for each in types} <= {32, block}
    for each in types:
        assert 8 * each.stored(10 * num_inputs) / (10 * num_inputs) == bits(each.name)
    sizes, noises = [bits(each.name) for each in types], [each.noise for each in types]
    assert sizes == sorted(set(sizes))
    assert noises == sorted(noises, reverse=True)


def test_there_is_none_for_rows_that_32_does_not_divide() -> None:
    assert types_for(48) == ()
