"""The safetensors format: the header's length (8 bytes), the header (JSON), the tensors' bytes without a gap.

A header is checked against its file before any data is read, so that a damaged file is found before hours of work
and not in the middle of them. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

from globe.checkpoint.files import readable, regular_size, what_it_is
from globe.errors import CheckpointError
from globe.typed import shown

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""The widest first."""
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64,
    "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
ALIGNMENT = 64
"""Bytes: where a loaded tensor, a view of the file, starts at a multiple of them, products are rounded as with a copy
of it in memory (MKL's float32 matrix-vector products tell places modulo 16 apart)."""
_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_MAX_DIMENSIONS, _MAX_BITS = 64, 2**63  # what torch can address
_AGAIN = "the file is damaged or was cut short: download or copy it again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    """Name in the checkpoint."""
    dtype: str
    """As safetensors writes it: BF16, F32, …"""
    shape: tuple[int, ...]
    """Sizes of the dimensions."""
    shard: str
    """File that holds it, relative to the checkpoint's folder."""
    offset: int
    """First byte, counted from the start of the shard's data."""
    nbytes: int
    """Bytes of data."""


def read_header(path: Path, shard: str) -> list[TensorInfo]:
    """The tensors of a file in the order of their bytes; `CheckpointError` unless header and file agree exactly."""
    entries, start, size = _open(path, shard)
    tensors = check_entries(entries, shard)
    held, named = size - start, sum(tensor.nbytes for tensor in tensors)
    if held != named:
        raise CheckpointError(f"{shard}: the header describes {named} bytes of data, the file holds {held}; {_AGAIN}")
    return tensors


def read_metadata(path: Path, shard: str) -> dict[str, str]:
    """The texts that a file's header holds beside its tensors; raises as `read_header`."""
    return _open(path, shard)[0].get("__metadata__") or {}


def _open(path: Path, shard: str) -> tuple[dict[str, Any], int, int]:
    """A file's parsed header, where its data starts, and its size."""
    size = regular_size(path)
    with readable(path), path.open("rb") as file:
        start = data_start(file, shard)
        if start > size:
            raise CheckpointError(f"{shard}: the header should end at byte {start} of a file of {size} bytes; {_AGAIN}")
        return _parse(file.read(start - 8), shard), start, size


def data_start(file: BinaryIO, shard: str) -> int:
    """Where the data of an open file starts; leaves the file at the start of the JSON header."""
    first = file.read(64)
    if known := what_it_is(first):
        raise CheckpointError(f"{shard} is not a safetensors file: {known}")
    if len(first) < 8:
        raise CheckpointError(f"{shard}: {len(first)} bytes are too few for a safetensors file; {_AGAIN}")
    (header,) = struct.unpack("<Q", first[:8])
    if header > _MAX_HEADER:
        raise CheckpointError(f"{shard}: not a safetensors file: its header would be {header} bytes long; {_AGAIN}")
    file.seek(8)
    return 8 + header


def check_entries(entries: Mapping[str, Any], shard: str) -> list[TensorInfo]:
    """The tensors of a parsed header in the order of their bytes, which must follow each other without gap or overlap.

    Raises `CheckpointError` naming the tensor whose dtype, shape and offsets do not agree.
    """
    tensors = [_tensor(name, entry, shard) for name, entry in entries.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 0
    for tensor in tensors:
        if tensor.offset != end:
            fault = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{shard}: tensor {shown(tensor.name)} {fault} (byte {tensor.offset}, not {end}); {_AGAIN}"
            )
        end += tensor.nbytes
    return tensors


def _parse(raw: bytes, shard: str) -> dict[str, Any]:
    """A header's JSON, as strictly as the safetensors library reads it."""
    try:
        text = raw.decode()
        entries = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():  # an escape that may be half a character
            json.dumps(entries, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{shard}: the header is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{shard}: the header is a JSON {type(entries).__name__}, not an object; {_AGAIN}")
    metadata = entries.get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{shard}: the header's __metadata__ is {shown(metadata)}, not texts by name; {_AGAIN}")
    return entries


def build_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds the tensors' bytes one after the other in this order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)  # the data starts aligned
    return struct.pack("<Q", len(header)) + header


def aligned(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """First those that fill multiples of `ALIGNMENT`, then the widest dtypes, otherwise in the order given.

    Every tensor then starts at a multiple of its item size, and nearly all those of a real model at one of `ALIGNMENT`.
    """
    return sorted(tensors, key=lambda tensor: (tensor.nbytes % ALIGNMENT != 0, -_BITS[tensor.dtype]))


def item_bytes(dtype: str) -> int:
    """Bytes of a number of a dtype that does not pack several into one."""
    return _BITS[dtype] // 8


def num_bytes(dtype: object, shape: object, place: object, name: str) -> int:
    """Bytes of the data of a tensor that a place names; `CheckpointError` if dtype or shape cannot be."""
    if not isinstance(dtype, str) or dtype not in _BITS:
        known = ", ".join(_BITS)
        raise CheckpointError(f"{_where(place, name)} has the unknown dtype {shown(dtype)}; known are {known}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{_where(place, name)} has shape {shown(shape)}, which cannot be; {_AGAIN}")
    widest = [size or 1 for size in shape]
    if len(shape) > _MAX_DIMENSIONS or math.prod(widest) * _BITS[dtype] > _MAX_BITS:
        raise CheckpointError(
            f"{_where(place, name)} has shape {shown(shape)}, more than any tensor can have; {_AGAIN}"
        )
    return (math.prod(shape) * _BITS[dtype] + 7) // 8


def _tensor(name: str, entry: object, shard: str) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{_where(shard, name)} has no dtype, shape and data_offsets in the header; {_AGAIN}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    needed = num_bytes(dtype, shape, shard, name)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{_where(shard, name)} lies at bytes {shown(offsets)}, which cannot be; {_AGAIN}")
    spanned = offsets[1] - offsets[0]
    if needed != spanned or math.prod(shape) * _BITS[dtype] % 8:
        raise CheckpointError(
            f"{_where(shard, name)} is {dtype} of shape {shown(shape)}, which takes {needed} bytes; its offsets give "
            f"{spanned}; {_AGAIN}"
        )
    return TensorInfo(name, dtype, tuple(shape), shard, offsets[0], spanned)


def _where(place: object, name: str) -> str:
    return f"{place}: tensor {shown(name)}"


def _are_sizes(values: object) -> TypeGuard[Sequence[int]]:
    return isinstance(values, list | tuple) and all(type(value) is int and value >= 0 for value in values)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("the same key twice")
    return entries


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
