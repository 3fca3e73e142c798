"""The Hub through the real client, against a server on this machine that answers as the Hub does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from globe.checkpoint.reader import open_checkpoint
from globe.errors import CheckpointError
from tests.hub import FakeHub, running_hub

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {FIRST: {"a": torch.arange(6.0), "b": torch.ones(2, 2)}, SECOND: {"c": torch.zeros(60_000)}}


@pytest.fixture
def hub(write_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = write_checkpoint(TENSORS, {"model_type": "m"})
    for name in ("tokenizer.json", "LICENSE", "modeling_x.py", "pytorch_model.bin"):
        (folder / name).write_text(f"of {name}")
    with running_hub(folder, tmp_path / "cache", monkeypatch) as server:
        yield server


def test_planning_downloads_no_shard_and_reading_only_the_one_it_needs(hub: FakeHub) -> None:
    checkpoint = open_checkpoint("owner/name")
    assert set(hub.downloads()) == {"config.json", "model.safetensors.index.json", "tokenizer.json", "LICENSE"}
    assert {name: tensor.shard for name, tensor in checkpoint.tensors.items()} == {"a": FIRST, "b": FIRST, "c": SECOND}
    assert checkpoint.config == {"model_type": "m"}
    assert [path.name for path in checkpoint.side_files().kept] == ["LICENSE", "tokenizer.json"]

    assert torch.equal(checkpoint.read("a"), TENSORS[FIRST]["a"])
    assert torch.equal(checkpoint.read("b"), TENSORS[FIRST]["b"])
    assert hub.downloads().count(FIRST) == 1
    assert SECOND not in hub.downloads()


def test_the_code_of_a_tokenizer_is_fetched_with_what_it_imports_and_no_other(hub: FakeHub) -> None:
    auto_map = {"AutoTokenizer": ["tok.Tok", "absent.Fast"], "AutoModel": "modeling_x.X"}
    (hub.folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (hub.folder / "tok.py").write_text("from .words import split\nfrom .gone import x\n")
    (hub.folder / "words.py").write_text("import .letters\n")
    (hub.folder / "letters.py").write_text("x = 1\n")
    side_files = open_checkpoint("owner/name").side_files()
    assert [name for name in hub.downloads() if name.endswith(".py")] == ["tok.py", "words.py", "letters.py"]
    assert [path.name for path in side_files.kept if path.suffix == ".py"] == ["letters.py", "tok.py", "words.py"]
    assert [told.split(",")[0] for told in side_files.left_out] == ["absent.py", "gone.py"]


def test_the_fingerprint_does_not_depend_on_what_is_downloaded(hub: FakeHub) -> None:
    checkpoint = open_checkpoint("owner/name", revision="main")
    before = checkpoint.fingerprint()
    for shard in checkpoint.shards:
        checkpoint.shard_path(shard)
    assert open_checkpoint("owner/name").fingerprint() == before
    hub.log.clear()
    assert torch.equal(open_checkpoint("owner/name").read("c"), TENSORS[SECOND]["c"])
    assert SECOND not in hub.downloads()


@pytest.mark.usefixtures("hub")
def test_what_is_in_the_cache_opens_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint("owner/name")
    for shard in checkpoint.shards:
        checkpoint.shard_path(shard)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(open_checkpoint("owner/name").read("c"), TENSORS[SECOND]["c"])


def test_a_shard_that_is_not_what_the_hub_announced(hub: FakeHub, write_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint("owner/name")
    other = write_checkpoint({FIRST: {"a": torch.arange(6.0), "b": torch.ones(4)}}, name="other")
    (hub.folder / FIRST).write_bytes((other / FIRST).read_bytes())
    with pytest.raises(CheckpointError, match="not the one the Hub announced"):
        checkpoint.read("a")


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("owner/other", None, "owner/other is neither a folder here nor a model on the Hub"),
        ("gated/model", None, "is gated: accept its terms"),
        ("owner/name", "v9", "has no revision 'v9'"),
        ("owner/na me", None, "neither a folder nor a Hub id"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_refuses_is_explained(model: str, revision: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(model, revision)
    assert caught.value.__cause__ is not None


def test_a_repository_without_safetensors(hub: FakeHub) -> None:
    (hub.folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no file model.safetensors on the Hub; only safetensors"):
        open_checkpoint("owner/name")


def test_a_header_that_lies(hub: FakeHub) -> None:
    content = (hub.folder / FIRST).read_bytes()
    (hub.folder / FIRST).write_bytes(content.replace(b'"shape":[6]', b'"shape":[7]'))
    with pytest.raises(CheckpointError, match=r"'a' is F32 of shape \[7\], which takes 28 bytes"):
        open_checkpoint("owner/name")
    (hub.folder / FIRST).write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        open_checkpoint("owner/name")


@pytest.mark.usefixtures("hub")
def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(CheckpointError, match=r"owner/name is not a folder here, .* ConnectError"):
            open_checkpoint("owner/name")
    checkpoint = open_checkpoint("owner/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"{FIRST}.* fetched"):
        checkpoint.read("a")
    with pytest.raises(CheckpointError, match=r"owner/name: model-.* cannot be fetched"):
        open_checkpoint("owner/name")
