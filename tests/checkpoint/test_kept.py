"""Files of an unfinished run that prove themselves."""

from __future__ import annotations

from pathlib import Path

import torch

from globe.checkpoint.kept import keep_tensors, kept_tensors
from tests.random_experts import normal

TENSORS = {"x": normal(3, 5, seed=0), "n": torch.arange(7, dtype=torch.int32), "none": torch.empty(0)}


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    assert kept_tensors(path) is None
    keep_tensors(path, TENSORS)
    found = kept_tensors(path)
    assert found is not None
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_damage_is_found(tmp_path: Path) -> None:
    """One bit of any tensor, the digest, or what is left of half a file."""
    path = tmp_path / "kept.safetensors"
    keep_tensors(path, TENSORS)
    content = path.read_bytes()
    header, size = 8 + int.from_bytes(content[:8], "little"), sum(tensor.nbytes for tensor in TENSORS.values())
    assert len(content) == header + size
    for place in (header, header + size // 2, len(content) - 1, content.index(b"sha256") + 12):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert kept_tensors(path) is None, place
    path.write_bytes(content[: len(content) // 2])
    assert kept_tensors(path) is None
