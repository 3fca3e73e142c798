"""Data sets of the Hub as texts, with a stand-in for the library; `tests/servers` has the library itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from globe import SettingsError
from globe.measure.texts import read_text


class Library:
    """`load_dataset` of rows that are counted as they are taken."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.asked, self.num_taken = rows, list[tuple[Any, ...]](), 0

    def load_dataset(self, path: str, name: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        self.asked.append((path, name, split, streaming))
        for row in self.rows:
            self.num_taken += 1
            yield row


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    stand_in = Library([{"id": number, "text": f"text {number}"} for number in range(10)])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=stand_in.load_dataset))
    return stand_in


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("Owner/name-1.0", ("Owner/name-1.0", None, "train", True)),
        ("a/b:en", ("a/b", "en", "train", True)),
        ("a/b:20231101.en:test", ("a/b", "20231101.en", "test", True)),
        ("a/b::test", ("a/b", None, "test", True)),
    ],
)
def test_only_the_rows_that_are_needed_are_taken(library: Library, name: str, asked: tuple[Any, ...]) -> None:
    assert read_text(name, 12) == "text 0\n\ntext"
    assert library.num_taken == 2
    assert library.asked == [asked]
    assert read_text(name).endswith("\n\ntext 9")


def test_chats_go_through_the_template(library: Library) -> None:
    library.rows[:] = [{"messages": [{"role": "user", "content": "hello"}]}]
    assert read_text("a/b", write_chat=lambda messages: f"<{messages[0]['content']}>") == "<hello>"


def test_a_file_comes_first(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/b").write_text("of the file")
    assert read_text("a/b") == "of the file"
    assert library.asked == []


def test_columns_that_are_not_text(library: Library) -> None:
    library.rows[:] = [{"question": "?", "answer": "!"}]
    with pytest.raises(
        SettingsError, match=r"record 1 of 'a/b' has no field `text` \(its fields: 'question', 'answer'\)"
    ):
        read_text("a/b")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingsError, match=r"'a/b' is no file here; .* pip install datasets"):
        read_text("a/b")


def test_what_the_library_raises_is_told(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("Dataset 'a/b' doesn't exist\non the Hub")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", fail)
    with pytest.raises(SettingsError, match=r"neither a file here nor a data set .*'a/b' doesn't exist on the Hub"):
        read_text("a/b")
    assert library.asked == []
