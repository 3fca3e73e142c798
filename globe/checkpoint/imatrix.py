"""What llama.cpp's `llama-quantize` is given: an importance matrix, in GGUF, and a list of tensors' types."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from globe.checkpoint.digest import file_sha256
from globe.checkpoint.writer import require_space, write_file
from globe.errors import SettingsError
from globe.terms import Family

IMATRIX, TENSOR_TYPES = "imatrix.gguf", "tensor_types.txt"


def experts_name(layer: int, family: Family) -> str:
    """The tensor of all experts' matrices of a family in a GGUF file."""
    return f"blk.{layer}.ffn_{family}_exps.weight"


def gguf_package() -> Any:
    """The package gguf; `SettingsError` where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise SettingsError(
            f"importance matrices are written by the package gguf, which cannot be imported ({error}): pip install gguf"
        ) from error


def save_imatrix(path: Path, importance: Mapping[str, tuple[Tensor, Tensor]], text: str, windows: Tensor) -> str:
    """Write an importance matrix as `llama-imatrix` does; returns its SHA-256.

    `importance`, by tensor: the sums (E, N) of the squares of an expert's inputs, and the tokens (E,) that they are of;
    `text` and token `windows` (count, length) are what the model was run on.

    Raises `OutputError` when the disk is full.
    """
    gguf = gguf_package()
    require_space(path, sum(sums.nbytes + counts.nbytes for sums, counts in importance.values()))
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [text])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, windows.shape[0])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, windows.shape[1])
    for name, (sums, counts) in importance.items():
        writer.add_tensor(f"{name}.in_sum2", sums.contiguous().numpy())
        writer.add_tensor(f"{name}.counts", counts[:, None].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file_sha256(path)


def save_tensor_types(path: Path, types: Mapping[str, str]) -> str:
    """Write a file for `--tensor-type-file`; returns its SHA-256."""
    lines = [f"{name.replace('.', '[.]')}={ggml_type}\n" for name, ggml_type in types.items()]  # regular expressions
    return write_file(path, "".join(lines).encode())
