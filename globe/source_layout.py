"""How the source arranged its tensors: written by compress, read by the dense export."""

from __future__ import annotations

import json
import math
from pathlib import Path

from globe.checkpoint.header import TORCH_DTYPES, TensorInfo
from globe.checkpoint.reader import Checkpoint, check_shard_name
from globe.checkpoint.writer import write_json
from globe.errors import CheckpointError

SOURCE_LAYOUT = "globe_source.json"


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
    try:
        shards: dict[str, list[tuple[str, str, list[int]]]] = json.loads(path.read_text())["shards"]
        tensors = {
            name: TensorInfo(name, dtype, tuple(shape), shard, 0, math.prod(shape) * TORCH_DTYPES[dtype].itemsize)
            for shard, entries in shards.items()
            for name, dtype, shape in entries
        }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!r}): the dense export needs it; copy it from the folder that "
            "globe compress wrote"
        ) from error
    for tensor in tensors.values():
        check_shard_name(SOURCE_LAYOUT, tensor.name, tensor.shard)
    config = {key: value for key, value in compressed.config.items() if key not in ("auto_map", "quantization_config")}
    return Checkpoint(compressed.folder, config, tensors, tuple(shards))
