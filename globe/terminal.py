"""The terminal, to which nothing from outside speaks but as text: names, paths, settings and messages are data.

Square brackets and colons are no markup there, and a character that would move the cursor, change colours, ring or turn
the direction of writing is shown by its escape, as Python writes it.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_KEPT = {"\n", "\t", "\u200c", "\u200d"}  # the joiners: parts of words and of emoji
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_BREAK = re.compile(r"[ \t]*[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]\s*")


def visible(text: str) -> str:
    """The text with its control characters, those of bidirectional writing too, and lone surrogates as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _UNSAFE and character not in _KEPT
        else character
        for character in text
    )


def one_line(text: str) -> str:
    """The same without line breaks: what is told in one paragraph cannot be made to look like several."""
    return visible(_BREAK.sub(" ", text.strip()))


class Terminal(Console):
    """A console without markup and emoji codes, on which every text is `visible`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def on_broken_pipe(self) -> None:
        """Leave it to the caller what a closed pipe means; rich would end the process."""
        raise

    def render_str(self, text: str, **settings: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As a table measures it: escapes need their room."""
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything on its way to the terminal; only segments that rich itself marks as control pass unseen."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def tame_logging() -> None:
    """Have transformers' warnings, which quote what the files say, escaped like everything else, and no bars of its:
    to be called before it is imported, which is not done here, for it takes long."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # transformers begins with what is said there
    logging.setLogRecordFactory(_record)


def _record(*args: Any, **settings: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **settings)
    if record.name.partition(".")[0] == "transformers":
        record.msg, record.args = visible(record.getMessage()), ()
    return record
