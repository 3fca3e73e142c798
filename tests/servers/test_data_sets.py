"""Data sets through the real `datasets` library, streamed from the imitation of the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from globe import SettingsError
from globe.measure.texts import read_text
from tests.hub import FakeHub, running_hub

NUM_ROWS = 40_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    served = tmp_path / "served"
    served.mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"id": number, "text": f"{split} {number} {'x' * 1000}"}) for number in range(NUM_ROWS)]
        (served / f"{split}.jsonl").write_text("\n".join(rows))
    with running_hub(served, tmp_path / "cache", monkeypatch) as server:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        yield server


@pytest.mark.parametrize(
    ("name", "split"), [("owner/name", "train"), ("owner/name:default:test", "test"), ("owner/name::test", "test")]
)
def test_the_first_rows_are_read_and_no_more(hub: FakeHub, name: str, split: str) -> None:
    sent = list[int]()
    hub.watch = lambda _, size: sent.append(size)
    text = read_text(name, 1020)
    assert text.startswith(f"{split} 0 x")
    assert f"\n\n{split} 1 x" in text
    assert sum(sent) < (hub.folder / "train.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("owner/name:other", "'other' not found.*default"),
        ("owner/name:default:validation", "Available splits: .*'train', 'test'"),
        ("owner/nowhere", "doesn't exist on the Hub"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_is_not_there(name: str, told: str) -> None:
    with pytest.raises(SettingsError, match=f"'{name}' is neither a file here nor a data set.*{told}"):
        read_text(name)
