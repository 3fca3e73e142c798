"""SHA-256 of files: what tells one content from another."""

from __future__ import annotations

import errno
import functools
import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; an `OSError` unless it is a regular one: a pipe or a device has no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settled_sha256(path: Path) -> str:
    """The same, read once for as long as the file keeps its size, its time and its place on the disk."""
    status = path.stat()
    return _settled(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


@functools.lru_cache(maxsize=4096)
def _settled(path: Path, *_: int) -> str:
    return file_sha256(path)
