"""Files that are either whole or absent: each is written beside its name, synced and moved there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from globe.checkpoint.header import TORCH_DTYPES, TensorInfo, aligned, build_header, data_start
from globe.checkpoint.reader import INDEX, Checkpoint
from globe.errors import CheckpointError, OutputError

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_METADATA = {"format": "pt"}
_CHUNK = 1 << 24
_TEMPORARY = ".tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; `metadata` is added to {"format": "pt"}.

    Raises `OutputError` when the disk is full; nothing is left under the name then.
    """
    infos = aligned(
        TensorInfo(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), path.name, 0, tensor.nbytes)
        for name, tensor in tensors.items()
    )
    with _replacing(path, sum(info.nbytes for info in infos)) as file:
        file.write(build_header(infos, {**_METADATA, **(metadata or {})}))
        for info in infos:
            file.write(_bytes(tensors[info.name]))


def copy_tensors(checkpoint: Checkpoint, shard: str, names: Collection[str], path: Path) -> None:
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
        with _replacing(path, sum(tensor.nbytes for tensor in kept)) as file:
            file.write(build_header(kept, _METADATA))
            for _, tensor in checkpoint.read_many(info.name for info in kept):
                file.write(_bytes(tensor))
        return
    with (
        checkpoint.shard_path(shard).open("rb") as source,
        _replacing(path, sum(tensor.nbytes for tensor in kept)) as file,
    ):
        start = data_start(source, shard)
        if len(kept) == len(held):
            _copy_range(source, file, 0, start + sum(tensor.nbytes for tensor in held))
            return
        file.write(build_header(kept, _METADATA))
        for tensor in kept:
            _copy_range(source, file, start + tensor.offset, tensor.nbytes)


def copy_side_files(checkpoint: Checkpoint, folder: Path, leave_out: Collection[str] = ()) -> None:
    """Take over the checkpoint's side files unchanged, but for the names in `leave_out`; `OutputError` as above."""
    for path in checkpoint.side_files().kept:
        if path.name not in leave_out:
            write_file(folder / path.relative_to(checkpoint.folder), path.read_bytes())


def write_json(path: Path, obj: Any) -> None:
    """Write JSON, indented; a NaN or an infinity, which JSON cannot say, is a `ValueError`."""
    content = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(
        path, content.encode(errors="backslashreplace")
    )  # bytes of a path that are not UTF-8: \udcXX, as in JSON


def write_file(path: Path, content: bytes) -> None:
    """Write a small file; `OutputError` as above."""
    with _replacing(path, len(content)) as file:
        file.write(content)


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a sharded checkpoint: which file holds each tensor, and their bytes in all."""
    write_json(
        folder / INDEX,
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def require_space(path: Path, nbytes: int) -> None:
    """Raise `OutputError` unless the file system that `path` is (or will be) on has `nbytes` free."""
    free = _free(path)
    if free < nbytes:
        raise OutputError(f"{path} needs {_readable(nbytes)}, {_readable(free)} are free: make room or write elsewhere")


def claim(output: Path) -> Path:
    """The folder to build `output` in: beside it, named `<output>.partial`, with what an interrupted run left in it.

    Raises `OutputError` if `output` exists and is not an empty folder, or cannot be made.
    """
    _check_vacant(output)
    partial = output.with_name(f"{output.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error}): choose another folder") from error
    return partial


def finish(partial: Path, output: Path) -> None:
    """Give the finished folder its name; `OutputError` if something else took the name meanwhile."""
    for leftover in partial.rglob(f"*{_TEMPORARY}"):  # of a write that was killed
        leftover.unlink()
    _check_vacant(output)
    if output.exists():
        output.rmdir()
    partial.rename(output)


def _check_vacant(output: Path) -> None:
    if output.is_dir():
        if any(output.iterdir()):
            raise OutputError(f"output folder {output} exists and is not empty: choose another name or remove it")
    elif output.exists():
        raise OutputError(f"output {output} exists and is a file: choose another name")


@contextlib.contextmanager
def _replacing(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        if error.errno in _FULL:
            raise OutputError(
                f"the disk is full: {path} needs {_readable(nbytes)}, {_readable(_free(path))} are free; "
                "make room and run again"
            ) from error
        raise OutputError(f"{path} cannot be written: {error}") from error


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _copy_range(source: BinaryIO, file: BinaryIO, start: int, nbytes: int) -> None:
    source.seek(start)
    while nbytes:
        chunk = source.read(min(_CHUNK, nbytes))
        if not chunk:
            raise CheckpointError(f"{source.name} ends {nbytes} bytes early: it changed after it was checked")
        file.write(chunk)
        nbytes -= len(chunk)


def _free(path: Path) -> int:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _readable(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
