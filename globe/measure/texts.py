"""Texts to calibrate and to judge on: as many characters as are asked for, from the beginning of a file or data set.

It is read no further than that, however large it is, and what holds no text is refused by name.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from globe.checkpoint.shipped import DATA
from globe.errors import SettingsError
from globe.measure.data_sets import SPELLING, names_data_set, read_rows

SPLITS = ("calibration", "heldout")

_SEPARATOR = "\n\n"
"""Between the texts of a data set."""
_READ = (
    "read are plain text (UTF-8, or UTF-16 with its mark) and .json or .jsonl records with a field `text`, or with a "
    "chat in `messages`"
)
_RECORDS = {".json", ".jsonl", ".ndjson"}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAGIC = (
    (b"%PDF-", "a PDF"),
    (b"PAR1", "a Parquet table"),
    (b"ARROW1", "an Arrow table"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ", "compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"PK\x03\x04", "a ZIP archive or an office document"),
    (b"GGUF", "a GGUF model"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"SQLite format 3", "a database"),
    (b"version https://git-lfs", "a Git LFS pointer: its file was not downloaded (git lfs pull)"),
)
_SUFFIXES = {
    ".parquet": "a Parquet table",
    ".arrow": "an Arrow table",
    ".feather": "an Arrow table",
    ".csv": "a table",
    ".tsv": "a table",
    ".xlsx": "a table",
    ".pdf": "a PDF",
    ".docx": "an office document",
    ".epub": "a book in a ZIP archive",
    ".gz": "compressed",
    ".bz2": "compressed",
    ".xz": "compressed",
    ".zst": "compressed",
    ".zip": "an archive",
    ".tar": "an archive",
    ".tgz": "an archive",
    ".bin": "binary",
    ".idx": "binary",
    ".npy": "binary",
    ".npz": "binary",
    ".pt": "binary",
    ".pkl": "binary",
    ".safetensors": "a model's weights",
    ".gguf": "a model's weights",
    ".ipynb": "a notebook",
}
_CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_SPACE = re.compile(r"[\s,]*")
_OPENING = re.compile(r"[\s\[]*")
_CHUNK = 1 << 16
_LONGEST_RECORD = 1 << 25
"""Characters of one record of a data set."""


WriteChat = Callable[[list[Any]], str]
"""Makes the text of a chat of its messages."""


def read_text(source: str | Path, most: int | None = None, write_chat: WriteChat | None = None) -> str:
    """At most the first `most` characters of a shipped split (`calibration` or `heldout`), of the text in a file, or of
    a data set of the Hub (see `read_rows`) where there is no such file.

    No more is read than they take. Plain text is UTF-8, or begins with the mark of UTF-8, UTF-16 or UTF-32. Of .json
    and .jsonl files and data sets, the `text` of each record counts, or what `write_chat` makes of its `messages`, with
    a blank line in between.

    Raises `SettingsError` for what is missing, empty, not a regular file or not text.
    """
    if str(source) in SPLITS:
        return gzip.decompress((DATA / f"{source}.txt.gz").read_bytes()).decode()[:most]
    path = Path(source)
    try:
        kind = "a folder" if path.is_dir() else "a device or a pipe" if path.exists() and not path.is_file() else None
        if kind is not None:
            raise SettingsError(f"text {str(source)!r} is {kind}: save the text to a file and give that")
        if names_data_set(str(source)) and not path.exists():
            text = _joined(str(source), read_rows(str(source)), most, write_chat)
        else:
            text = _read(path, most, write_chat)
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise SettingsError(
            f"text {str(source)!r} is not {error.encoding.upper()} ({error.reason}): convert it first, for example "
            "`iconv -f latin1 -t utf-8 OLD > NEW`"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        if isinstance(error, OSError) and error.errno not in _ABSENT:
            raise SettingsError(f"text {str(source)!r} cannot be read: {error}") from error
        raise SettingsError(
            f"text {_short(str(source))} is neither a file nor one of the shipped splits {', '.join(SPLITS)}, nor "
            f"spelled as a data set of the Hub: {SPELLING}"
        ) from error
    if not text.strip():
        raise SettingsError(f"text {str(source)!r} is empty: give one with words in it")
    return text


def _read(path: Path, most: int | None, write_chat: WriteChat | None) -> str:
    with path.open("rb") as file:
        beginning = file.read(64)
    kind = next((kind for magic, kind in _MAGIC if beginning.startswith(magic)), _SUFFIXES.get(path.suffix.lower()))
    if kind is not None:
        raise SettingsError(f"text {str(path)!r} is {kind}; {_READ}: save its text as one of these")
    encoding = next((encoding for mark, encoding in _MARKS if beginning.startswith(mark)), "utf-8")
    with path.open(encoding=encoding) as reader:
        if path.suffix.lower() in _RECORDS:
            return _joined(str(path), _records(path, reader), most, write_chat)
        text = reader.read(-1 if most is None else most)
    if "\0" in text:
        raise SettingsError(f"text {str(path)!r} holds NUL: it is binary, or UTF-16 without its mark; {_READ}")
    if _holds_records(text):
        raise SettingsError(f"text {str(path)!r} holds JSON records: give its name the ending .jsonl to have them read")
    return text


def _joined(source: str, records: Iterable[Any], most: int | None, write_chat: WriteChat | None) -> str:
    """The texts of the records, until there is enough of them."""
    parts, length = list[str](), 0
    for number, record in enumerate(records, 1):
        part = _text_of(source, number, record, write_chat)
        if not part:
            continue
        parts.append(part)
        length += len(part) + len(_SEPARATOR)
        if most is not None and length >= most:
            break
    return _SEPARATOR.join(parts)[:most]


def _text_of(source: str, number: int, record: Any, write_chat: WriteChat | None) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    messages = record.get("messages") if isinstance(record, dict) and "text" not in record else None
    if write_chat and isinstance(messages, list):
        try:
            text = write_chat(messages)
        except SettingsError as error:
            raise SettingsError(f"the chat in record {number} of {source!r} is not read: {error}") from error
    if isinstance(text, str):
        text.encode()  # a lone surrogate is no character
        return text
    place = f"record {number} of {source!r}"
    if not isinstance(record, dict):
        raise SettingsError(f"{place} is a JSON {type(record).__name__}; {_READ}")
    if "text" in record:
        raise SettingsError(f"the field `text` of {place} is a {type(text).__name__}, not a string")
    if chat := next((name for name in _CHATS if name in record), None):
        raise SettingsError(
            f"{place} holds a chat ({chat}) that is not read: {_READ}, a list of objects with `role` and `content`; or "
            "write it out with the model's chat template (apply_chat_template) as the field `text` first"
        )
    names = ", ".join(_short(str(name)) for name in list(record)[:6]) or "none"
    raise SettingsError(f"{place} has no field `text` (its fields: {names}); {_READ}: rename the field that holds text")


def _records(path: Path, reader: IO[str]) -> Iterator[Any]:
    """The JSON values of a file, one after the other or in one list, with no more of it in memory than one takes."""
    decoder, buffer, place, line, more, closing = json.JSONDecoder(), "", 0, 1, True, ""
    while True:
        start = _SPACE.match(buffer, place).end()  # pyright: ignore[reportOptionalMemberAccess]
        line, place = line + buffer.count("\n", place, start), start
        rest = buffer[place : place + 1]
        if rest and rest == closing:
            return
        if rest == "[" and not closing:
            closing, place = "]", place + 1
            continue
        try:
            value, end = decoder.raw_decode(buffer, place)
        except (ValueError, RecursionError) as error:
            if not (more or rest or closing):
                return
            if not more or len(buffer) - place > _LONGEST_RECORD or not _is_cut(error, buffer):
                raise SettingsError(f"{str(path)!r} cannot be read as JSON (line {line}): {error}") from error
            read = reader.read(max(_CHUNK, len(buffer) - place))
            buffer, place, more = buffer[place:] + read, 0, bool(read)
            continue
        yield value
        line, place = line + buffer.count("\n", place, end), end


def _is_cut(error: Exception, buffer: str) -> bool:
    """Whether JSON is at fault where it ends, so that more of it may mend it."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated") or error.pos > len(buffer) - 16
    )


def _holds_records(text: str) -> bool:
    try:
        first, _ = json.JSONDecoder().raw_decode(text[_OPENING.match(text).end() :])  # pyright: ignore[reportOptionalMemberAccess]
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and any(name in first for name in ("text", *_CHATS))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
