"""Shards on their way from the Hub: which are fetched when, and how many of them lie in a folder."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.errors import CheckpointError, SettingsError
from tests.hub import FakeHub, running_hub

NUM_SHARDS = 6


def shard(number: int) -> str:
    return f"model-{number + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"


def tensor(layer: int, half: int) -> str:
    return f"model.layers.{layer}.{half}"


@pytest.fixture
def hub(write_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Of each layer, but the first and the last, the one half ends a shard and the other begins the next."""
    tensors = {shard(number): dict[str, torch.Tensor]() for number in range(NUM_SHARDS)}
    for layer in range(NUM_SHARDS + 1):
        for half in range(2):
            place = min(max(layer - 1 + half, 0), NUM_SHARDS - 1)
            tensors[shard(place)][tensor(layer, half)] = torch.full((500,), 2.0 * layer + half)
    with running_hub(write_checkpoint(tensors, {"model_type": "m"}), tmp_path / "cache", monkeypatch) as server:
        yield server
        server.released.set()
        for ahead in [thread for thread in threading.enumerate() if "_fulfil" in thread.name]:
            ahead.join()


def fetched(hub: FakeHub) -> list[str]:
    return [name for name in hub.downloads() if name.endswith(".safetensors")]


def go_through(checkpoint: Checkpoint, layers: Iterator[int]) -> None:
    """Read the halves of each layer twice, as families one after the other are read."""
    for layer in layers:
        for half in (0, 1, 0, 1):
            assert float(checkpoint.read(tensor(layer, half))[0]) == 2 * layer + half


def test_the_next_shard_is_fetched_while_one_is_read(hub: FakeHub) -> None:
    checkpoint = open_checkpoint("owner/name")
    hub.faults[shard(1)] = ["hold"]
    assert float(checkpoint.read(tensor(0, 0))[0]) == 0
    while shard(1) not in fetched(hub):
        pass
    assert shard(2) not in fetched(hub)
    hub.released.set()
    assert float(checkpoint.read(tensor(2, 0))[0]) == 4
    go_through(checkpoint, iter(range(NUM_SHARDS + 1)))
    assert sorted(fetched(hub)) == [shard(number) for number in range(NUM_SHARDS)]


def size_if_there(path: Path) -> int:
    """0 where it was deleted or renamed meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("backwards", [False, True])
def test_a_pass_fetches_each_shard_once_and_has_three_at_a_time(hub: FakeHub, tmp_path: Path, backwards: bool) -> None:
    folder, peaks = tmp_path / "passing", list[int]()

    def watch(name: str, size: int) -> None:
        if name.endswith(".safetensors"):
            others = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".incomplete")]
            peaks.append(size + sum(map(size_if_there, others)))

    hub.watch = watch
    checkpoint = open_checkpoint("owner/name", passing=folder)
    assert checkpoint.coming is not None
    order = [*range(NUM_SHARDS + 1)]
    go_through(checkpoint, reversed(order) if backwards else iter(order))
    assert sorted(fetched(hub)) == [shard(number) for number in range(NUM_SHARDS)]
    assert checkpoint.coming.most == 3
    assert max(peaks) <= checkpoint.coming.most_bytes + 3 * 1000  # of headers
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


@pytest.mark.usefixtures("hub")
def test_another_order_than_that_of_the_shards_is_slower_and_right(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("owner/name", passing=tmp_path / "passing")
    go_through(checkpoint, iter([0, 6, 0, 3, 1, 5, 2, 4]))
    assert checkpoint.coming is not None
    checkpoint.coming.settle()
    assert len([*(tmp_path / "passing").glob("*.safetensors")]) <= checkpoint.coming.most


def test_what_the_cache_has_is_read_there(hub: FakeHub, tmp_path: Path) -> None:
    open_checkpoint("owner/name").fetched()
    hub.log.clear()
    go_through(open_checkpoint("owner/name", passing=tmp_path / "passing"), iter(range(NUM_SHARDS + 1)))
    assert not fetched(hub)
    assert len([*(tmp_path / "cache").rglob("*.safetensors")]) == NUM_SHARDS


def test_what_a_killed_run_has_left_is_not_fetched_again_where_it_is_of_the_commit(
    hub: FakeHub, tmp_path: Path
) -> None:
    first = open_checkpoint("owner/name", passing=tmp_path)
    first.read(tensor(2, 0))
    assert first.coming is not None
    first.coming.settle()
    assert fetched(hub) == [shard(1), shard(2)]
    (tmp_path / shard(0)).write_bytes((hub.folder / shard(5)).read_bytes())  # of nobody knows what
    checkpoint = open_checkpoint("owner/name", passing=tmp_path)
    go_through(checkpoint, iter([2, 1]))
    assert checkpoint.coming is not None
    checkpoint.coming.settle()
    assert sorted(fetched(hub)) == [shard(0), shard(1), shard(2), shard(3)]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 256)
    checkpoint = open_checkpoint("owner/name")
    hub.log.clear()
    hub.faults[shard(1)] = ["drop"]
    go_through(checkpoint, iter([0, 1, 2]))
    whole, rest = (span for method, name, span in hub.log if (method, name) == ("GET", shard(1)))
    assert whole is None
    assert rest is not None
    assert 0 < int(rest.removeprefix("bytes=").removesuffix("-")) <= (hub.folder / shard(1)).stat().st_size // 2


def test_a_shard_that_is_cut_short_is_refused_when_it_is_asked_for_and_then_fetched_anew(hub: FakeHub) -> None:
    checkpoint = open_checkpoint("owner/name")
    hub.faults[shard(1)] = ["cut"]
    checkpoint.read(tensor(0, 0))
    with pytest.raises(CheckpointError, match=f"{shard(1)} cannot be fetched .*of size 4192 but has size 2096"):
        checkpoint.read(tensor(2, 0))
    assert float(checkpoint.read(tensor(2, 0))[0]) == 4


def test_other_processes_fetch_by_themselves(hub: FakeHub) -> None:
    checkpoint = pickle.loads(pickle.dumps(open_checkpoint("owner/name")))
    go_through(checkpoint, iter([0]))
    assert shard(0) in fetched(hub)


def test_a_local_folder_does_not_pass(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="low_disk is for a model of the Hub"):
        open_checkpoint(hub.folder, passing=tmp_path / "passing")
