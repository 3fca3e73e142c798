"""Models compressed as they come from the Hub: the same bytes as from a folder, on a disk that does not hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from globe import CompressConfig
from globe.checkpoint.reader import open_checkpoint
from globe.cli.main import main
from globe.errors import SettingsError
from globe.measure import runnable
from globe.run import compress as compress_module
from globe.run.compress import compress
from globe.run.outlook import inspect
from tests.hub import FakeHub, running_hub
from tests.model.compressed import tiny_config
from tests.tiny_sources import write_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompressConfig]:
    folder = tmp_path_factory.mktemp("served")
    settings = {**tiny_config("qwen2_moe", torch.float32).to_dict(), "num_hidden_layers": 6, "layer_types": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2MoeConfig(**settings)).save_pretrained(
        folder / "model", max_shard_size="20KB"
    )
    write_tokenizer(folder / "model", LETTERS)
    (folder / "text.txt").write_text(LETTERS[::3] * 100)
    config = CompressConfig(bits=3, layers=(1, 4), calibrate=str(folder / "text.txt"), calibration_tokens=512)
    return folder / "model", config


@pytest.fixture(scope="module")
def streamed(served: tuple[Path, CompressConfig]) -> Path:
    """From the folder, a layer at a time."""
    model, config = served
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runnable, "MEMORY_SHARE", 0.0)
        compress(model, model.with_name("streamed"), config)
    return model.with_name("streamed")


@pytest.fixture
def hub(served: tuple[Path, CompressConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub(served[0], tmp_path / "cache", monkeypatch) as server:
        yield server


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return dict(checkpoint.read_many(checkpoint.tensors))


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def fetched(hub: FakeHub) -> Counter[str]:
    return Counter(name for name in hub.downloads() if name.endswith(".safetensors"))


def test_low_disk_has_few_shards_at_a_time_and_the_same_bytes(
    served: tuple[Path, CompressConfig], streamed: Path, hub: FakeHub, tmp_path: Path
) -> None:
    output, at_once = tmp_path / "out", list[int]()

    def watch(name: str, size: int) -> None:
        if name.endswith(".safetensors"):
            others = [*tmp_path.rglob("source/*.safetensors"), *tmp_path.rglob("source/**/*.incomplete")]
            at_once.append(size + sum(path.stat().st_size for path in others))

    foreseen = inspect("owner/name", served[1], low_disk=True)
    hub.watch = watch
    report = compress("owner/name", output, served[1], low_disk=True)
    assert report.calibration is not None
    assert "a part of the source" in str(report.calibration.streamed_because)
    assert max(at_once) <= foreseen.here + 12_000  # of headers
    assert foreseen.here < 0.6 * foreseen.read
    times = fetched(hub)
    assert sum(times.values()) <= foreseen.passes * len(times)
    assert_same(output, streamed)
    assert not [*tmp_path.rglob("source")]
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


@pytest.mark.parametrize("low_disk", [False, True])
def test_a_killed_run_fetches_only_what_it_still_needs(
    served: tuple[Path, CompressConfig],
    streamed: Path,
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    low_disk: bool,
) -> None:
    config, output = served[1], tmp_path / "out"
    monkeypatch.setattr(runnable, "MEMORY_SHARE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(compress_module, "assemble", raise_killed)
        with pytest.raises(Killed):
            compress("owner/name", output, config, low_disk=low_disk)
    hub.log.clear()
    compress("owner/name", output, config, low_disk=low_disk)
    assert_same(output, streamed)
    num_shards = len(open_checkpoint("owner/name").shards)
    assert sum(fetched(hub).values()) <= (num_shards if low_disk else 0)


def raise_killed(*_: object, **__: object) -> None:
    raise Killed


def test_what_low_disk_cannot_do(served: tuple[Path, CompressConfig], hub: FakeHub, tmp_path: Path) -> None:
    model, config = served
    with pytest.raises(SettingsError, match="low_disk is for bits"):
        compress("owner/name", tmp_path / "out", CompressConfig(keep=0.5), low_disk=True)
    with pytest.raises(SettingsError, match="is a local folder"):
        compress(model, tmp_path / "out", config, low_disk=True)
    assert main(["compress", "owner/name", "-o", str(tmp_path / "out"), "--low-disk", "--max-kl", "0.1"]) == 1
    assert main(["inspect", "owner/name", "--low-disk", "--plan"]) == 1
    assert not fetched(hub)


def test_inspect_says_what_low_disk_costs(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "owner/name", "--low-disk"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "of it downloaded 7 times, " in told
    assert "here at a time" in told
    assert not fetched(hub)
