"""The small files of a checkpoint: regular ones of a bounded size, inside its folder, and JSON read in one place."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from globe.checkpoint.side_files import outside
from globe.errors import CheckpointError
from globe.typed import shown
from globe.units import byte_size

MAX_JSON = 64_000_000
"""Bytes of the largest JSON file that is read; the index of a model of 10^12 parameters has 20 MB."""
MAX_DEPTH = 50
"""Levels of nesting that are read; configurations have three or four."""
_LFS = b"version https://git-lfs.github.com/spec/"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the file system says against reading `path` into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def unfinished(folder: Path) -> str | None:
    """What to say of an output that is not there because its run has not ended; None otherwise."""
    with readable(folder):
        if folder.exists() or not (partial := folder.with_name(f"{folder.name}.partial")).is_dir():
            return None
    return f"its run is not finished and lies in {partial}; the command that began it goes on with it"


def unwritten(folder: Path) -> str | None:
    """Why a folder has nothing of what a run writes, where that is plain: it is not there."""
    return unfinished(folder) or (None if folder.exists() else "there is no such folder")


def regular_size(path: Path) -> int:
    """Bytes of a file; `CheckpointError` unless it is there and a regular one: a pipe or a device has no end."""
    with readable(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
        raise CheckpointError(f"{path} is {kind}, not a file: it is not read")
    return status.st_size


def check_contained(path: Path, root: Path) -> None:
    """Raise `CheckpointError` if links lead from `path` out of the folder `root`, but into the blobs of a Hub cache."""
    if (real := outside(root, str(path.relative_to(root)))) is not None:
        cached = next((part for part in real.parts if part.startswith("models--")), "")
        hub_id = "/".join(cached.split("--")[1:])
        way = f"give the Hub id {hub_id}, or " if hub_id else "if you trust it, "
        raise CheckpointError(
            f"{path} is a link to {real}, outside the folder: it is not followed; {way}make a copy that holds the "
            f"files themselves (cp -rL {root} COPY)"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, NaN and Infinity included, which transformers writes too.

    Raises `CheckpointError` unless it is a regular file in its folder, of a sane size, UTF-8, and one object.
    """
    size = regular_size(path)
    check_contained(path, path.parent)
    if size > MAX_JSON:
        raise CheckpointError(
            f"{path} has {byte_size(size)}, of which {byte_size(MAX_JSON)} are read at most: "
            f"{what_it_is(_first_bytes(path)) or 'it is hardly the file of a model; download or copy it again'}"
        )
    with readable(path):
        raw = path.read_bytes()
    return parse_json(raw, str(path))


def _first_bytes(path: Path) -> bytes:
    with readable(path), path.open("rb") as file:
        return file.read(64)


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The object that a JSON text says; `CheckpointError` naming `where` it is from if there is none."""
    try:
        text = raw.decode()
        content = json.loads(text)
        if "\\ud" in text.lower():  # an escape that may be half a character, which nothing can write again
            json.dumps(content, ensure_ascii=False).encode()
        if isinstance(content, dict):
            _check_depth(content)
    except (ValueError, RecursionError) as error:
        reason = what_it_is(raw) or f"{error}; download or copy it again"
        raise CheckpointError(f"{where} cannot be read as JSON: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} holds {shown(content)}, not a JSON object; download or copy it again")
    return content


def _check_depth(content: dict[str, Any]) -> None:
    """Raise `ValueError` for values nested so deep that copying and writing them runs out of stack."""
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        inner = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def what_it_is(raw: bytes) -> str | None:
    """What a file is instead of what its name says, by its first bytes, and what to do."""
    if raw.startswith(_LFS):
        return (
            "it is a Git LFS pointer, which stands for the file: run `git lfs install` and `git lfs pull` in the folder"
        )
    if raw.startswith(b"GGUF"):
        return "it is a GGUF file: load it in transformers with gguf_file=NAME and save_pretrained"
    if raw.startswith(b"PK\x03\x04"):
        return "it is a zip archive, as torch.save writes: load it in transformers and save_pretrained"
    if raw.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or raw.lstrip()[:5].lower() == b"<html":
        return (
            "it is a web page, as a failed download leaves it: download it again, after `hf auth login` if it is gated"
        )
    return "it holds zeros only: download or copy it again" if raw and not raw.strip(b"\0") else None
