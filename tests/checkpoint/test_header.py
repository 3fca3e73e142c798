from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from globe.checkpoint.header import read_header
from globe.errors import CheckpointError

Write = Callable[[Path, Any, bytes], Path]


def entry(start: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_reads_what_the_library_writes_in_the_order_of_the_bytes(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5),
        "bytes": torch.zeros(3, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "half": torch.zeros(2, 3, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "a.safetensors", "a.safetensors")
    assert {t.name: (t.dtype, t.shape, t.nbytes) for t in found} == {
        "scalar": ("F32", (), 4),
        "bytes": ("U8", (3,), 3),
        "empty": ("F32", (0, 4), 0),
        "half": ("BF16", (2, 3), 12),
    }
    assert [t.offset for t in found] == sorted(t.offset for t in found)
    assert {t.shard for t in found} == {"a.safetensors"}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, b"\0" * 7, "describes 8 bytes of data, the file holds 7"),
        ({"a": entry(0, 8)}, b"\0" * 9, "describes 8 bytes of data, the file holds 9"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, b"\0" * 8, "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20, "'b' leaves a gap"),
        ({"a": entry(4, 12)}, b"\0" * 12, "'a' leaves a gap"),
        ({"a": entry(0, 8, shape=(3,))}, b"\0" * 8, r"takes 12 bytes; its offsets give 8"),
        ({"a": entry(0, 8, dtype="F31")}, b"\0" * 8, "unknown dtype 'F31'"),
        ({"a": entry(0, 8, dtype="F4", shape=(15,))}, b"\0" * 8, "its offsets give 8"),
        ({"a": entry(8, 0)}, b"\0" * 8, "which cannot be"),
        ({"a": entry(0, 8, shape=(-2,))}, b"\0" * 8, "which cannot be"),
        ({"a": entry(0, 8, shape=(1,) * 200_000)}, b"\0" * 8, "more than any tensor can have"),
        ({"a": entry(0, 0, shape=(0, 2**62, 4))}, b"", "more than any tensor can have"),
        ({"a": {**entry(0, 8), "shape": [True, 2]}}, b"\0" * 8, "which cannot be"),
        ({"a": {**entry(0, 8), "shape": [2.0]}}, b"\0" * 8, "which cannot be"),
        ({"a": {**entry(0, 8), "dtype": ["F32"]}}, b"\0" * 8, r"unknown dtype \['F32'\]"),
        ({"a": {**entry(0, 8), "data_offsets": [0, 8, 8]}}, b"\0" * 8, "which cannot be"),
        ({"__metadata__": {"format": 1}}, b"", "not texts by name"),
        (b'{"a": "\\ud800"}', b"", "not valid JSON"),
        (b'{"a": NaN}', b"", "NaN is no number"),
        ({"a": {"dtype": "F32"}}, b"", "has no dtype, shape and data_offsets"),
        ({"a": [0, 8]}, b"", "has no dtype, shape and data_offsets"),
        ([1, 2], b"", "not an object"),
        (b'{"a": ', b"", "not valid JSON"),
        (b'{"\xff": 1}', b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "the same key twice"),
        (b"[" * 100_000, b"", "not valid JSON"),
    ],
)
def test_a_header_that_lies_is_found(tmp_path: Path, write_raw: Write, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(write_raw(tmp_path / "x.safetensors", header, data), "x.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\x08\0\0", "3 bytes are too few"),
        (struct.pack("<Q", 50) + b"{}", "should end at byte 58 of a file of 10 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"GGUF\3\0\0\0\0", "GGUF"),
        (b"PK\3\4 and so on", "zip archive"),
        (bytes(64), "zeros only"),
    ],
)
def test_what_is_no_safetensors_file_is_found(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path, "x.safetensors")
