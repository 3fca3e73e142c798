from __future__ import annotations

import json
import os
import stat
import string
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from globe.checkpoint import tensor_files
from globe.checkpoint.header import read_header
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.checkpoint.tensor_files import copy_tensors, save_tensors
from globe.checkpoint.writer import make_folder, require_space, write_index, write_json
from globe.errors import CheckpointError, OutputError

SHARD = "model.safetensors"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int64, torch.bool]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor))


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Any bit patterns, NaN payloads included, in any of the dtypes; scalars and empty tensors too."""
    names = draw(st.lists(st.text(string.ascii_letters + "._ é", min_size=1, max_size=6), unique=True, max_size=6))
    made = {}
    for name in names:
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        raw = draw(st.binary(min_size=nbytes, max_size=nbytes))
        values = torch.frombuffer(bytearray(raw or b"\0" * dtype.itemsize), dtype=torch.uint8)
        values = values & 1 if dtype == torch.bool else values
        made[name] = values.view(dtype)[: torch.Size(shape).numel()].reshape(shape)
    return made


def test_tensors_of_whole_lines_start_at_one_wherever_the_file_is_mapped(tmp_path: Path) -> None:
    """Then the products with a loaded tensor are rounded as those with a copy of it are."""
    made = {
        "tripwire": torch.zeros(1, 1, 1),
        "codes": torch.zeros(6, 3, dtype=torch.bfloat16),
        "adapters": torch.zeros(6, 8, 4),
        "odd": torch.zeros(5, dtype=torch.uint8),
        "packed": torch.zeros(3, 64, dtype=torch.uint8),
        "wide": torch.zeros(3, dtype=torch.int64),
    }
    for number in range(8):  # headers of every length
        save_tensors(tmp_path / SHARD, made, {"note": "x" * number})
        loaded = load_file(tmp_path / SHARD)
        assert_same_bits(loaded, made)
        for name, tensor in loaded.items():
            assert tensor.data_ptr() % (64 if name in ("adapters", "packed") else tensor.itemsize) == 0, name


def opened(folder: Path, content: dict[str, Tensor]) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    save_file(content, folder / SHARD, metadata={"format": "pt"})
    return open_checkpoint(folder)


@given(content=tensors())
@settings(max_examples=60, deadline=None)
def test_saved_tensors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Tensor]
) -> None:
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    save_tensors(path, content, {"note": "kept"})
    assert_same_bits(load_file(path), content)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    for tensor in read_header(path, path.name):
        assert tensor.offset % content[tensor.name].itemsize == 0


@given(content=tensors(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_copied_tensors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Tensor], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("copied")
    kept = data.draw(st.sets(st.sampled_from(sorted(content)))) if content else set()
    copy_tensors(opened(folder, content), SHARD, kept, folder / "copy.safetensors")
    assert_same_bits(load_file(folder / "copy.safetensors"), {name: content[name] for name in kept})
    with safe_open(folder / "copy.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_copy_of_everything_is_the_file_itself(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {"a": torch.randn(5), "b": torch.arange(3)})
    copy_tensors(checkpoint, SHARD, ["b", "a"], tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / SHARD).read_bytes()


def test_long_tensors_are_copied_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_CHUNK", 7)
    content = {"a": torch.randn(50), "b": torch.randn(3), "c": torch.randn(40)}
    copy_tensors(opened(tmp_path, content), SHARD, ["a", "c"], tmp_path / "copy.safetensors")
    assert_same_bits(load_file(tmp_path / "copy.safetensors"), {name: content[name] for name in ("a", "c")})


def test_a_copy_of_what_the_shard_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tensor 'z'"):
        copy_tensors(opened(tmp_path, {"a": torch.ones(1)}), SHARD, ["a", "z"], tmp_path / "copy.safetensors")


def test_a_source_that_shrinks_while_it_is_copied(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {"a": torch.ones(10), "b": torch.ones(10)})
    with (tmp_path / SHARD).open("r+b") as file:
        file.truncate((tmp_path / SHARD).stat().st_size - 5)
    for names in (["a", "b"], ["b"]):
        with pytest.raises(CheckpointError, match="ends 5 bytes early"):
            copy_tensors(checkpoint, SHARD, names, tmp_path / "copy.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", SHARD]


def test_tensors_that_are_not_contiguous_or_need_gradients_are_saved(tmp_path: Path) -> None:
    whole = torch.randn(4, 6, requires_grad=True)
    save_tensors(tmp_path / "x.safetensors", {"t": whole.T, "half": whole[:, :3]})
    expected = {"t": whole.detach().T.contiguous(), "half": whole.detach()[:, :3].contiguous()}
    assert_same_bits(load_file(tmp_path / "x.safetensors"), expected)


def test_files_have_the_permissions_of_ordinary_files(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    (tmp_path / "plain").write_text("x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x.safetensors", "plain")}
    assert len(modes) == 1


def test_json_and_index(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"é": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"é": [1, None]}
    write_index(tmp_path, {"b": "2.safetensors", "a": "1.safetensors"}, 12)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 12}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", float("nan"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on which no byte fits")
@pytest.mark.parametrize("action", ["tensors", "copy", "json"])
def test_a_full_disk_leaves_the_old_file_and_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    checkpoint = opened(tmp_path, {"a": torch.ones(500_000), "b": torch.ones(3)})
    target = tmp_path / "out" / "x"
    target.parent.mkdir()
    target.write_text("old")
    actions: dict[str, Callable[[], None]] = {
        "tensors": lambda: save_tensors(target, {"a": torch.ones(500_000)}),
        "copy": lambda: copy_tensors(checkpoint, SHARD, ["a"], target),
        "json": lambda: write_json(target, "x" * 2_000_000),
    }

    def opened_full(path: Path, mode: str, **_: object) -> IO[Any]:
        return open("/dev/full" if mode == "xb" else path, mode.replace("x", "w"))  # noqa: PTH123

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened_full)
        with pytest.raises(OutputError, match=r"disk is full: .*x needs 2\.00 MB, .* are free"):
            actions[action]()
    assert [path.name for path in target.parent.iterdir()] == ["x"]
    assert target.read_text() == "old"


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        save_tensors(tmp_path / "file" / "x.safetensors", {"a": torch.ones(3)})
    with pytest.raises(OutputError, match="cannot be written"):
        make_folder(tmp_path / "file" / "output")


def test_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OutputError, match=r"needs 1000000000\.00 GB, .* are free"):
        require_space(tmp_path / "not" / "yet", 10**18)
