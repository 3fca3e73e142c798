from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from globe.checkpoint.reader import open_checkpoint
from globe.errors import CheckpointError, SettingsError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Write = Callable[..., Path]


@pytest.fixture
def sharded(write_checkpoint: Write) -> Path:
    return write_checkpoint({FIRST: {"a": torch.randn(2, 3), "b": torch.ones(4)}, SECOND: {"c": torch.zeros(5)}})


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def test_a_single_file(write_checkpoint: Write) -> None:
    tensors = {"x": torch.randn(3, 2).bfloat16(), "y": torch.arange(4)}
    folder = write_checkpoint({"model.safetensors": tensors}, {"model_type": "m"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shards == ("model.safetensors",)
    assert checkpoint.config == {"model_type": "m"}
    assert checkpoint.tensors["x"].shape == (3, 2)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.read(name).dtype == tensor.dtype


def test_shards(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    assert checkpoint.shards == (FIRST, SECOND)
    assert {name: tensor.shard for name, tensor in checkpoint.tensors.items()} == {"a": FIRST, "b": FIRST, "c": SECOND}
    expected = load_file(sharded / FIRST) | load_file(sharded / SECOND)
    for name, tensor in checkpoint.read_many(["c", "a", "b", "c"]):
        assert torch.equal(tensor, expected[name])


def test_a_single_file_is_preferred_to_an_index_of_the_same_tensors(sharded: Path) -> None:
    tensors = {name: tensor + 1 for file in (FIRST, SECOND) for name, tensor in load_file(sharded / file).items()}
    save_file(tensors, sharded / "model.safetensors")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.shards == ("model.safetensors",)
    assert torch.equal(checkpoint.read("b"), tensors["b"])
    (note,) = checkpoint.notes
    assert "model.safetensors is read" in note


def test_a_single_file_beside_the_index_of_another_model_is_refused(sharded: Path) -> None:
    save_file({"z": torch.ones(1)}, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors of 1 tensors beside an index of 3 .* Remove"):
        open_checkpoint(sharded)
    for shard in (FIRST, SECOND):  # the index is all that is left of the other
        (sharded / shard).unlink()
    assert list(open_checkpoint(sharded).tensors) == ["z"]


def test_an_unknown_tensor_is_named(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        open_checkpoint(sharded).read("nope")


def test_a_shard_removed_after_opening(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        checkpoint.read("c")


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"1 of 2 shards are missing: {SECOND}"):
        open_checkpoint(sharded)


def test_a_truncated_shard(sharded: Path) -> None:
    content = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{SECOND}: .* cut short"):
        open_checkpoint(sharded)


def test_an_index_that_lists_what_no_file_holds_is_passed_over_and_told(sharded: Path) -> None:
    edit_index(sharded, ghost=SECOND, a=SECOND)
    checkpoint = open_checkpoint(sharded)
    assert {name: tensor.shard for name, tensor in checkpoint.tensors.items()} == {"a": FIRST, "b": FIRST, "c": SECOND}
    absent, moved = checkpoint.notes
    assert "lists 1 tensors that no file holds; they are left out: ghost" in absent
    assert "lists 1 tensors in other files" in moved


def test_what_the_index_does_not_list_is_read_and_told(sharded: Path) -> None:
    save_file({"c": torch.zeros(5), "extra": torch.ones(1)}, sharded / SECOND)
    checkpoint = open_checkpoint(sharded)
    assert torch.equal(checkpoint.read("extra"), torch.ones(1))
    (note,) = checkpoint.notes
    assert "hold 1 tensors that model.safetensors.index.json does not list; they are read: extra" in note


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    save_file({"c": torch.zeros(5), "a": torch.ones(2, 3)}, sharded / SECOND)
    with pytest.raises(CheckpointError, match=f"tensor 'a' is in {FIRST} and in {SECOND}"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors"]
)
def test_an_index_that_points_outside(sharded: Path, place: str) -> None:
    save_file({"c": torch.zeros(5)}, sharded.parent / "x.safetensors")
    edit_index(sharded, c=place)
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(sharded)


def test_a_link_that_leads_outside(sharded: Path) -> None:
    shutil.move(sharded / SECOND, sharded.parent / "elsewhere.safetensors")
    (sharded / SECOND).symlink_to("../elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere"):
        open_checkpoint(sharded)


def test_a_linked_folder_is_followed(sharded: Path) -> None:
    (sharded.parent / "link").symlink_to(sharded)
    assert "c" in open_checkpoint(sharded.parent / "link").tensors


@pytest.mark.parametrize("shared", [False, True], ids=["blobs", "blobs shared by repositories"])
def test_the_links_of_a_hub_cache_are_followed(sharded: Path, shared: bool) -> None:
    repository = sharded.parent / "models--o--n"
    snapshot, blobs, store = repository / "snapshots" / "c0ffee", repository / "blobs", sharded.parent / "blobs" / "ab"
    for folder in (snapshot, blobs, store):
        folder.mkdir(parents=True)
    for path in list(sharded.iterdir()):
        if shared:
            shutil.move(path, store / path.name)
            (blobs / path.name).symlink_to(Path("../../blobs/ab") / path.name)
        else:
            shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert torch.equal(open_checkpoint(snapshot).read("b"), torch.ones(4))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "no weight_map"),
        (["a"], "no weight_map"),
        ({"a": 1}, "only safetensors"),
        ({"a": "x.bin"}, "only safetensors"),
    ],
)
def test_an_index_without_a_usable_map(sharded: Path, weight_map: object, message: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"weights as pytorch_model.bin; only safetensors is read: convert"),
        ("consolidated.00.pth", "only safetensors is read"),
        ("model.Q4.gguf", r"gguf_file=NAME and save_pretrained"),
        ("model-00001-of-00002.safetensors", "it has model-00001-of-00002.safetensors without an index; download that"),
        ("weights.safetensors", "if that is the whole model, rename it to model.safetensors"),
        ("adapter_config.json", r"holds an adapter \(LoRA\) and not a model: merge it .*merge_and_unload"),
        ("model_index.json", "pipeline of diffusers"),
        ("notes.md", "no weights at all"),
    ],
)
def test_a_folder_without_readable_weights(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("3", "not a JSON object"),
    ],
)
def test_an_unusable_configuration(tmp_path: Path, content: str | None, message: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "a/b/c", "~/models", "../x"])
def test_a_path_that_does_not_exist(model: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(model)


def test_a_file_instead_of_a_folder(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="give the folder"):
        open_checkpoint(sharded / FIRST)


def test_a_revision_of_a_local_folder(sharded: Path) -> None:
    with pytest.raises(SettingsError, match="only Hub ids"):
        open_checkpoint(sharded, revision="main")


def test_the_fingerprint_follows_the_content_and_not_the_place(sharded: Path) -> None:
    original = open_checkpoint(sharded).fingerprint()
    copy = Path(shutil.copytree(sharded, sharded.parent / "copy"))
    assert open_checkpoint(copy).fingerprint() == original

    save_file({"c": torch.ones(5)}, copy / SECOND, metadata={"format": "pt"})
    assert open_checkpoint(copy).fingerprint() != original
    shutil.copy(sharded / SECOND, copy / SECOND)
    (copy / "config.json").write_text('{"model_type": "other"}')
    assert open_checkpoint(copy).fingerprint() != original


def test_side_files_are_all_but_weights_code_and_configuration(sharded: Path) -> None:
    kept = ["LICENSE", "README.md", "chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.model"]
    dropped = ["pytorch_model.bin", "optimizer.pt", "a.gguf", "x.pkl", "modeling_x.py", "pytorch_model.bin.index.json"]
    for name in [*kept, *dropped, ".hidden.json"]:
        (sharded / name).write_bytes(b"x")
    (sharded / "original").mkdir()
    (sharded / "original" / "params.json").write_text("{}")
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tool.jinja").write_text("x")
    names = [path.relative_to(sharded).as_posix() for path in open_checkpoint(sharded).side_files().kept]
    assert names == sorted([*kept, "additional_chat_templates/tool.jinja"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "it is empty"),
        (["inner/config.json"], r"has no config.json, but .*inner has: give that folder"),
        (["snapshots/abc/config.json", "refs/main"], r"but .*snapshots/abc has"),
        (["x.gguf"], "GGUF is not read"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge it into its base first"),
        (["unfinished", "model-00001-of-00003.safetensors"], "a run that is not finished; the command that began it"),
        (["notes.md"], "it holds notes.md: is it the folder of a Hugging Face model"),
    ],
)
def test_a_folder_that_is_not_a_model_s_own(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", INDEX, FIRST])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_opened(sharded: Path, name: str, kind: str) -> None:
    (sharded / name).unlink()
    if kind == "pipe":
        os.mkfifo(sharded / name)
    elif kind == "folder":
        (sharded / name).mkdir()
    else:
        (sharded / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"it is not (read|followed)"):
        open_checkpoint(sharded)


def test_a_configuration_that_is_a_link_out_of_the_folder_is_not_read(sharded: Path) -> None:
    shutil.move(sharded / "config.json", sharded.parent / "secret.json")
    (sharded / "config.json").symlink_to(sharded.parent / "secret.json")
    with pytest.raises(CheckpointError, match=r"is a link to .*secret.json, outside the folder"):
        open_checkpoint(sharded)


def test_a_link_into_the_hub_s_cache_names_what_to_give(sharded: Path) -> None:
    blobs = sharded.parent / "hub" / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    shutil.move(sharded / SECOND, blobs / "abc")
    (sharded / SECOND).symlink_to(blobs / "abc")
    with pytest.raises(CheckpointError, match=r"give the Hub id owner/name, or make a copy .*cp -rL"):
        open_checkpoint(sharded)


def test_a_git_lfs_pointer_is_told_from_a_damaged_file(sharded: Path) -> None:
    for name in (SECOND, "config.json"):
        (sharded / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4932307584\n")
        with pytest.raises(CheckpointError, match=rf"{name} .*Git LFS pointer.*git lfs pull"):
            open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}", "levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b'{"model_type": []}', r"model_type is \[\]; it must be text"),
        (b'{"text_config": 3}', "text_config is 3"),
        (b'{"text_config": {"num_hidden_layers": "2"}}', "text_config.num_hidden_layers is '2'"),
        (b'{"num_hidden_layers": 1000000000}', "num_hidden_layers is 1000000000, and the files hold 3 tensors"),
        (b'{"vision_config": {"depth": 1e9}}', "depth is 1000000000.0"),
        (b'{"text_config": {"n_routed_experts": 100000}}', "n_routed_experts is 100000"),
        (b'{"num_labels": 100000000}', "num_labels"),
    ],
)
def test_a_configuration_that_cannot_be_names_its_fault(sharded: Path, content: bytes, message: str) -> None:
    (sharded / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


def test_a_file_larger_than_any_configuration_is_not_read(sharded: Path) -> None:
    with (sharded / "config.json").open("r+b") as file:
        file.truncate(10**12)
    with pytest.raises(CheckpointError, match=r"has 1000\.00 GB, of which 64\.00 MB are read"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("https://huggingface.co/owner/name/tree/main", "give the Hub id alone: owner/name"),
        ("owner/name/more", "no Hub id"),
        ("a\0b", "neither a folder nor a Hub id"),
        ("x" * 5000, "cannot be read: File name too long"),
    ],
)
def test_names_that_are_no_models(model: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)
