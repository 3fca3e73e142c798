from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from globe import SettingsError
from globe.measure.texts import read_text
from globe.measure.tokenizers import chat_writer

ACCENTS = "Der Übergang über die Brücke – für 5 €.\n" * 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_plain_text_is_read_in_every_encoding_that_it_names(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(ACCENTS.encode(encoding))
    assert read_text(path) == ACCENTS
    assert read_text(path, 7) == "Der Übe"


def test_line_endings_are_those_of_unix(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"a\r\nb\r\n")
    assert read_text(tmp_path / "text.txt") == "a\nb\n"


def test_a_split_is_cut_too() -> None:
    assert read_text("heldout", 100) == read_text("heldout")[:100]


RECORDS = [{"id": 1, "text": "one [1] {x}"}, {"text": ""}, {"text": 'two "2"\n\\', "meta": {"text": ["no"]}}]
TEXT = 'one [1] {x}\n\ntwo "2"\n\\'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("docs.jsonl", "\n".join(map(json.dumps, RECORDS))),
        ("docs.JSONL", "\r\n\n".join(map(json.dumps, RECORDS)) + "\n\n"),
        ("docs.ndjson", "\ufeff" + "\n".join(map(json.dumps, RECORDS))),
        ("docs.json", json.dumps(RECORDS)),
        ("docs.json", json.dumps(RECORDS, indent=2)),
        ("lines.json", "\n".join(map(json.dumps, RECORDS))),
    ],
)
def test_of_records_the_text_is_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_text(tmp_path / name) == TEXT
    assert read_text(tmp_path / name, 5) == TEXT[:5]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1), st.booleans())
def test_records_equal_those_of_json(tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii: bool) -> None:
    path = tmp_path_factory.mktemp("records") / "docs.jsonl"
    lines = (json.dumps({"n": number, "text": text}, ensure_ascii=ascii) for number, text in enumerate(texts))
    path.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    expected = "\n\n".join(texts)
    if expected.strip():
        assert read_text(path) == expected


def test_a_record_that_is_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    long = "".join(chr(32 + number % 90) for number in range(300_000))
    (tmp_path / "docs.json").write_text(json.dumps([{"text": long}, {"text": "end"}]))
    assert read_text(tmp_path / "docs.json") == f"{long}\n\nend"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", ACCENTS.encode("latin-1", "replace"), "not UTF-8"),
        ("a.txt", "text".encode("utf-16")[:-1], "not UTF-16"),
        ("a.txt", "text".encode("utf-16-le"), "UTF-16 without its mark"),
        ("a.txt", b"\x00" * 100, "NUL"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.jsonl", b'{"text": ""}\n', "is empty"),
        ("a.txt", b"%PDF-1.7\n", "a PDF"),
        ("a.txt", gzip.compress(b"text", mtime=0), "compressed by gzip"),
        ("a.txt.gz", b"text", "compressed"),
        ("a.txt", b"PAR1abc", "a Parquet table"),
        ("a.parquet", b"text", "a Parquet table"),
        ("a.ARROW", b"text", "an Arrow table"),
        ("a.bin", b"text", "binary"),
        ("a.csv", b"id,text\n1,x\n", "a table"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.txt", b'{"text": "x"}\n{"text": "y"}\n', r"ending \.jsonl"),
        ("a.txt", b'[{"messages": []}]', r"ending \.jsonl"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "chat template"),
        ("a.jsonl", b'{"conversations": []}', "chat template"),
        ("a.jsonl", b'{"text": "x"}\n{"content": "y", "id": 3}', r"record 2 .* \(its fields: 'content', 'id'\)"),
        ("a.jsonl", b'{"text": null}', "is a NoneType, not a string"),
        ("a.json", b'{"text": ["x", "y"]}', "is a list, not a string"),
        ("a.json", b'["x", "y"]', "is a JSON str"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": y}', r"as JSON \(line 3\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', r"as JSON \(line 2\)"),
        ("a.json", b'[{"text": "x"}', "as JSON"),
        ("a.json", b'{"a":' * 100_000, "as JSON"),
        ("a.json", b'{"a": ' + b"1" * 10_000 + b"}", "as JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', "not UTF-8"),
        ("a.jsonl", b'{"text": "\xe9"}', "not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        read_text(tmp_path / name, 1000)


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if not loop.last %}|{% endif %}{% endfor %}"


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def test_chats_are_written_out_by_the_chat_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    lines = ({"messages": chat}, {"text": "in between"}, {"messages": chat[:1], "source": "elsewhere"})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_text(tmp_path / "a.jsonl", write_chat=chat_writer(tokenizer(TEMPLATE)))
    assert found == "<user>What?|<assistant>That.\n\nin between\n\n<user>What?"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, [], "the chat in record 1 of .* the model has no chat template"),
        (TEMPLATE, [3], "chat template does not take it .* `role` and `content`"),
        ("{{ raise_exception('must alternate') }}", [{"role": "user", "content": ""}], "must alternate"),
        (TEMPLATE, "x", "holds a chat .* that is not read"),
    ],
)
def test_a_chat_that_cannot_be_written_out_is_named(
    tmp_path: Path, template: str | None, messages: object, message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(SettingsError, match=message):
        read_text(tmp_path / "a.jsonl", write_chat=chat_writer(tokenizer(template)))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(SettingsError, match="save the text to a file"):
            read_text(path, 100)


@pytest.mark.parametrize("name", ["no-such-split", "x" * 5000, "a\0b", "text.txt/be/low"])
def test_what_is_not_there_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(SettingsError, match="neither a file nor one of the shipped splits calibration, heldout"):
        read_text(name)


@pytest.mark.parametrize("name", ["large.txt", "large.jsonl"])
def test_a_large_file_costs_what_is_read_of_it(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.write((b'{"text": "a line of it"}\n' if name.endswith("l") else b"a line of it\n") * 10_000)
        file.truncate(3 << 30)
    tracemalloc.start()
    try:
        assert len(read_text(tmp_path / name, 50_000)) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
