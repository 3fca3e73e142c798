"""Tables on the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import Claim


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table."""

    key: str
    """The rows' entry; left blank where a row has none."""
    heading: str
    format: str = ""
    """Format specification; words are set to the left, numbers to the right."""


def print_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    """Print `rows`, nothing cut off where the output is no terminal."""
    table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(column.heading, justify="right" if column.format else "left")
    for row in rows:
        cells = ((row.get(column.key), column.format) for column in columns)
        table.add_row(*("" if value is None else format(value, specification) for value, specification in cells))
    _console().print(table)


def print_claims(claims: Sequence[Claim]) -> None:
    """Print every claim with what was measured."""
    for claim in claims:
        mark = "[green]holds[/]" if claim.holds else "[red]does not hold[/]"
        _console().print(f"{mark}: {claim.statement}: {claim.measured}", highlight=False, soft_wrap=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)
