"""Files that are either whole or absent: each is written beside its name, synced and moved there.

Every function that writes a file returns the SHA-256 of what was meant to be written, for the folder's manifest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from globe.checkpoint.reader import INDEX, Checkpoint
from globe.errors import GlobeError, OutputError
from globe.units import byte_size

TEMPORARY = ".tmp"
"""Ending of a file that is being written; what has it after a kill is of no use."""
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Hashed:
    """A file open for writing, and the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256 = file, hashlib.sha256()

    def write(self, content: bytes | memoryview) -> None:
        self._sha256.update(content)
        self._file.write(content)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


def copy_side_files(checkpoint: Checkpoint, folder: Path, leave_out: Collection[str] = ()) -> dict[str, str]:
    """Take over the checkpoint's side files unchanged, but for the names in `leave_out`; `OutputError` as above.

    Returns the SHA-256 of each by its name in the folder.
    """
    written: dict[str, str] = {}
    for path in checkpoint.side_files().kept:
        if path.name not in leave_out:
            name = path.relative_to(checkpoint.folder)
            make_folder((folder / name).parent)
            written[name.as_posix()] = write_file(folder / name, path.read_bytes())
    return written


def write_json(path: Path, obj: Any) -> str:
    """Write JSON, indented; a NaN or an infinity, which JSON cannot say, is a `ValueError`."""
    content = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_file(
        path, content.encode(errors="backslashreplace")
    )  # of paths that are not UTF-8: \udcXX, as in JSON


def write_file(path: Path, content: bytes) -> str:
    """Write a small file; `OutputError` as above."""
    with replacing(path, len(content)) as file:
        file.write(content)
    return file.sha256


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> str:
    """Write the index of a sharded checkpoint: which file holds each tensor, and their bytes in all."""
    return write_json(
        folder / INDEX,
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    )


def make_folder(path: Path) -> None:
    """Make the folder, and those above it, unless they are there; `OutputError` if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error}): choose another folder") from error


def require_space(path: Path, nbytes: int) -> None:
    """Raise `OutputError` unless the file system that `path` is (or will be) on has `nbytes` free."""
    free = _free(path)
    if free < nbytes:
        raise OutputError(f"{path} needs {byte_size(nbytes)}, {byte_size(free)} are free: make room or write elsewhere")


@contextlib.contextmanager
def replacing(path: Path, nbytes: int = 0) -> Iterator[Hashed]:
    """A file to write to, of about `nbytes`, that gets its name, in place of what had it, when it is whole and synced.

    Raises `OutputError` when the disk is full or the file cannot be written; nothing changes under the name then.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            yield Hashed(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError) or isinstance(error, GlobeError):
            raise
        if error.errno in _FULL:
            raise OutputError(
                f"the disk is full: {path} needs {byte_size(nbytes)}, {byte_size(_free(path))} are free; "
                "make room and run again"
            ) from error
        raise OutputError(f"{path} cannot be written: {error}") from error


def sync_folder(path: Path) -> None:
    """Have the names in a folder survive a loss of power, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(path: Path) -> int:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
