"""How the source arranged its tensors: written by compress, read by the dense export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.checkpoint.files import read_json
from globe.checkpoint.header import TensorInfo, num_bytes
from globe.checkpoint.reader import Checkpoint, check_shard_name
from globe.checkpoint.writer import write_json
from globe.errors import CheckpointError
from globe.typed import parsed, shown

SOURCE_LAYOUT = "globe_source.json"
_AGAIN = "copy it from the folder that globe compress wrote"


def write_source_layout(folder: Path, source: Checkpoint) -> str:
    """Record name, dtype and shape of every tensor of the source, by shard and in order; returns the file's SHA-256."""
    shards = {
        shard: [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in source.shard_tensors(shard)]
        for shard in source.shards
    }
    return write_json(folder / SOURCE_LAYOUT, {"shards": shards})


def read_source_layout(compressed: Checkpoint) -> Checkpoint:
    """The source as it was, without its data: its configuration, and the names, dtypes, shapes and shards.

    Raises `CheckpointError` if the compressed checkpoint's folder has no readable record of its source, or one that
    names files outside the folder.
    """
    path = compressed.folder / SOURCE_LAYOUT
    shards = parsed(_Layout, _read(path), str(path), CheckpointError).shards
    tensors: dict[str, TensorInfo] = {}
    for shard, entries in shards.items():
        for entry in entries:
            name, dtype, shape = _entry(entry, path)
            check_shard_name(SOURCE_LAYOUT, name, shard)
            nbytes = num_bytes(dtype, shape, path, name)
            if dtype not in TORCH_DTYPES or name in tensors:
                reason = "twice" if name in tensors else f"as {dtype}, which torch does not have"
                raise CheckpointError(f"{path} lists tensor {shown(name)} {reason}; {_AGAIN}")
            tensors[name] = TensorInfo(name, dtype, tuple(shape), shard, 0, nbytes)
    config = {key: value for key, value in compressed.config.items() if key not in ("auto_map", "quantization_config")}
    return Checkpoint(compressed.folder, config, tensors, tuple(shards))


@dataclasses.dataclass(frozen=True)
class _Layout:
    shards: dict[str, list[Any]]


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path} is not there, and tells how the source was arranged; {_AGAIN}")
    return read_json(path)


def _entry(entry: object, path: Path) -> tuple[str, str, list[int]]:
    match entry:
        case [str(name), str(dtype), list(shape)]:
            return name, dtype, shape
        case _:
            raise CheckpointError(f"{path} holds {shown(entry)}, not name, dtype and shape of a tensor; {_AGAIN}")
