"""Stacks of expert matrices that wait, in memory or, where they are large, in a file without a name."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from globe.errors import OutputError
from globe.quant.sizes import MOST_WEIGHTS


class StackOnDisk:
    """Matrices (E, …) in a file without a name, which ends with the process; as many are in memory as are asked for.

    Indexed as a tensor is, by an expert or by some next to each other. What was never written is 0.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> None:
        """Raises `OutputError` if the folder cannot be written."""
        self.shape, self.dtype, self._folder = torch.Size(shape), dtype, folder
        self._matrix_bytes = math.prod(shape[1:]) * dtype.itemsize
        with self._explained():
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # goes with the stack
            weakref.finalize(self, self._file.close)
            self._file.truncate(shape[0] * self._matrix_bytes)

    def __getitem__(self, experts: int | slice) -> Tensor:
        first, count = self._place(experts)
        found = torch.empty(count, *self.shape[1:], dtype=self.dtype)
        self._move(os.preadv, found, first)
        return found[0] if isinstance(experts, int) else found

    def __setitem__(self, experts: int | slice, matrices: Tensor) -> None:
        first, count = self._place(experts)
        stored = matrices.expand(count, *self.shape[1:]).to(self.dtype).contiguous()
        self._move(os.pwritev, stored, first)

    def _place(self, experts: int | slice) -> tuple[int, int]:
        chosen = range(self.shape[0])[experts]
        if isinstance(chosen, int):
            return chosen, 1
        assert chosen.step == 1, "experts next to each other"
        return chosen.start, len(chosen)

    def _move(self, move: Callable[[int, list[memoryview], int], int], matrices: Tensor, first: int) -> None:
        """All bytes of matrices from or to the file; the system may take a part at a time."""
        left, offset = matrices.flatten().view(torch.uint8).numpy().data, first * self._matrix_bytes
        with self._explained():
            while left:
                moved = move(self._file.fileno(), [left], offset)
                left, offset = left[moved:], offset + moved

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self._folder} cannot hold the {math.prod(self.shape) * self.dtype.itemsize} bytes of a layer's "
                f"experts that wait there ({error.strerror}): make room, and give the command again"
            ) from error


Stack = Tensor | StackOnDisk


def empty_stack(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Stack:
    """Room for matrices (E, …), to be written before it is read: in a file of the `folder` where they are of more
    weights than may be in memory at once, unless there is none."""
    if folder is None or math.prod(shape) <= MOST_WEIGHTS:
        return torch.empty(shape, dtype=dtype)
    return StackOnDisk(shape, dtype, folder)
