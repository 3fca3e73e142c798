"""A stack on disk, against a tensor that is written and read in the same places."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer, source_names
from globe.checkpoint.stacks import dense_tensor
from globe.errors import OutputError
from globe.experts import on_disk
from globe.experts.on_disk import StackOnDisk, empty_stack
from globe.terms import FAMILIES

SHAPE = (5, 3, 2)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PLACES = st.one_of(st.integers(-5, 4), st.builds(slice, st.none() | st.integers(-7, 7), st.none() | st.integers(-7, 7)))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(DTYPES), st.lists(PLACES, max_size=4), PLACES, st.integers(0, 2**31))
def test_it_reads_what_was_written(
    tmp_path: Path, dtype: torch.dtype, written: list[int | slice], read: int | slice, seed: int
) -> None:
    stack, expected = StackOnDisk(SHAPE, dtype, tmp_path), torch.zeros(SHAPE, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for place in written:
        matrices = torch.randn(expected[place].shape, generator=generator)  # in another dtype than most stacks
        stack[place] = expected[place] = matrices.to(dtype)
    assert torch.equal(stack[read], expected[read])
    assert stack[read].dtype == dtype
    assert (stack.shape, stack.dtype) == (expected.shape, expected.dtype)
    assert [*tmp_path.iterdir()] == []  # the file has no name


def test_matrices_are_written_as_they_are_seen(tmp_path: Path) -> None:
    stack, transposed = StackOnDisk(SHAPE, torch.float32, tmp_path), torch.randn(5, 2, 3).mT
    stack[:] = transposed
    assert torch.equal(stack[:], transposed)


@pytest.mark.parametrize("at_once", [1, 7])
def test_the_system_may_take_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    def some(move: Callable[[int, list[memoryview], int], int]) -> Any:
        return lambda file, parts, offset: move(file, [parts[0][:at_once]], offset)

    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(os, name, some(getattr(os, name)))
    matrices, stack = torch.randn(SHAPE), StackOnDisk(SHAPE, torch.float32, tmp_path)
    stack[:] = matrices
    assert torch.equal(stack[1:4], matrices[1:4])


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"nowhere cannot hold the 60 bytes .*No such file"):
        StackOnDisk(SHAPE, torch.bfloat16, tmp_path / "nowhere")
    stack = StackOnDisk(SHAPE, torch.bfloat16, tmp_path)
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OutputError, match=r"cannot hold the 60 bytes .*No space left on device\): make room"):
        stack[0] = torch.zeros(3, 2)


def test_only_what_is_large_goes_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "MOST_WEIGHTS", 30)
    for shape, folder, is_on_disk in ((SHAPE, tmp_path, False), ((31,), tmp_path, True), ((31,), None, False)):
        stack = empty_stack(shape, torch.bfloat16, folder)
        assert (tuple(stack.shape), stack.dtype) == (shape, torch.bfloat16)
        assert isinstance(stack, StackOnDisk if is_on_disk else Tensor)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_source_is_made_of_it_as_of_a_tensor(
    tmp_path: Path, layout: Literal["per_expert", "fused"], transposed: bool
) -> None:
    E, P, D = SHAPE
    names = ("gate_proj", "up_proj", "down_proj") if layout == "per_expert" else ("gate_up", "gate_up", "down")
    layer = ExpertLayer(0, "experts", layout, names, E, P, D, "F32", transposed=transposed)
    stacks = {family: torch.randn(SHAPE) for family in FAMILIES}
    on_disk = {family: StackOnDisk(SHAPE, torch.float32, tmp_path) for family in FAMILIES}
    for family in FAMILIES:
        on_disk[family][:] = stacks[family]
    for name in {name for family in FAMILIES for name in source_names(layer, family)}:
        assert torch.equal(dense_tensor(layer, name, on_disk), dense_tensor(layer, name, stacks))
