"""Tensors of an unfinished run in a file that proves itself: it holds the digest of what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from globe.checkpoint.tensor_files import save_tensors, tensor_bytes

_DIGEST = "sha256"


def keep_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write them, to be taken up by `kept_tensors`; `OutputError` when the disk is full."""
    save_tensors(path, tensors, {_DIGEST: _digest(tensors)})


def kept_tensors(path: Path) -> dict[str, Tensor] | None:
    """What was written; None where nothing was, or it was damaged since."""
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get(_DIGEST)
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    return tensors if expected == _digest(tensors) else None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and contents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
