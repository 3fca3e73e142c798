"""Files of tensors, written a tensor or a chunk at a time, whole or not at all; each function returns the SHA-256."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from globe.checkpoint.dtypes import DTYPE_NAMES
from globe.checkpoint.header import TensorInfo, aligned, build_header, data_start
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.writer import Hashed, replacing
from globe.errors import CheckpointError

_METADATA = {"format": "pt"}
_CHUNK = 1 << 24


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file; `metadata` is added to {"format": "pt"}.

    Raises `OutputError` when the disk is full; nothing is left under the name then.
    """
    infos = aligned(
        TensorInfo(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), path.name, 0, tensor.nbytes)
        for name, tensor in tensors.items()
    )
    return save_each(path, infos, (tensors[info.name] for info in infos), metadata)


def save_each(
    path: Path, infos: Sequence[TensorInfo], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """The same with a tensor at a time in memory, as they come; names, dtypes and shapes are told before."""
    with replacing(path, sum(info.nbytes for info in infos)) as file:
        file.write(build_header(infos, {**_METADATA, **(metadata or {})}))
        for info, tensor in zip(infos, tensors, strict=True):
            assert (tuple(tensor.shape), DTYPE_NAMES[tensor.dtype]) == (info.shape, info.dtype), info.name
            file.write(tensor_bytes(tensor))
    return file.sha256


def copy_tensors(checkpoint: Checkpoint, shard: str, names: Collection[str], path: Path) -> str:
    """Write the named tensors of a shard to a file of their own, bit for bit, with a chunk at a time in memory.

    All of the shard's tensors: the file itself is copied. Of a dequantised checkpoint, what its tensors stand for is
    written, with a tensor at a time in memory. Raises `CheckpointError` for a name that the shard lacks,
    `OutputError` when the disk is full.
    """
    held = checkpoint.shard_tensors(shard)
    kept = aligned(tensor for tensor in held if tensor.name in names)
    if len(kept) != len(set(names)):
        lacking = sorted(set(names) - {tensor.name for tensor in kept})
        raise CheckpointError(f"{shard} holds no tensor {lacking[0]!r}")
    if not checkpoint.stored_plainly:
        return save_each(path, kept, (tensor for _, tensor in checkpoint.read_many(info.name for info in kept)))
    with (
        checkpoint.shard_path(shard).open("rb") as source,
        replacing(path, sum(tensor.nbytes for tensor in kept)) as file,
    ):
        start = data_start(source, shard)
        if len(kept) == len(held):
            _copy_range(source, file, 0, start + sum(tensor.nbytes for tensor in held))
        else:
            file.write(build_header(kept, _METADATA))
            for tensor in kept:
                _copy_range(source, file, start + tensor.offset, tensor.nbytes)
    return file.sha256


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements as they are stored."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data  # one element may have any stride


def _copy_range(source: BinaryIO, file: Hashed, start: int, nbytes: int) -> None:
    source.seek(start)
    while nbytes:
        chunk = source.read(min(_CHUNK, nbytes))
        if not chunk:
            raise CheckpointError(f"{source.name} ends {nbytes} bytes early: it changed after it was checked")
        file.write(chunk)
        nbytes -= len(chunk)
