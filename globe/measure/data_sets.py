"""Data sets of the Hub as the `datasets` library reads them: row by row from the first one on, fetched as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from globe.errors import SettingsError

SPELLING = "OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME:CONFIG:SPLIT"
_SPELLED = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<config>[^:]*))?(?::(?P<split>[^:]+))?")


def names_data_set(name: str) -> bool:
    """Whether a name could be that of a data set."""
    return _SPELLED.fullmatch(name) is not None


def read_rows(name: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set, spelled as `SPELLING` says; without a config the one that it has or prefers, without a
    split `train`.

    Raises `SettingsError` where it cannot be read, or `datasets` is not installed.
    """
    spelled = _SPELLED.fullmatch(name)
    assert spelled is not None
    try:
        library: Any = import_module("datasets")
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"text {name!r} is no file here; to read it as a data set of the Hub: pip install datasets"
        ) from error
    try:
        split = spelled["split"] or "train"
        yield from library.load_dataset(spelled["repo"], spelled["config"] or None, split=split, streaming=True)
    except Exception as error:  # those of the library, of what it reads files with, and of the network
        raise SettingsError(
            f"text {name!r} is neither a file here nor a data set that can be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}): check the spelling, {SPELLING}, and the network; if it is private "
            "or gated, `hf auth login`"
        ) from error
