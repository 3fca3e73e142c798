"""What the documentation says of the code, held against the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import globe
from globe import errors

ROOT = Path(__file__).parents[1]
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}


def messages() -> Iterator[tuple[str, str]]:
    """Where each error is raised, and its message with … for what is filled in."""
    for path in sorted((ROOT / "globe").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[message])) if name in ERRORS:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", template(message)
                case _:
                    pass


def template(message: ast.expr) -> str:
    match message:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(template, parts))
        case ast.BinOp(left=left, right=right):
            return template(left) + template(right)
        case ast.FormattedValue(value=ast.Name(id="_AGAIN")):
            return "the file is damaged"
        case _:
            return "…"


def test_the_page_of_faults_has_every_message() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]
    phrases = [
        re.compile(".*".join(map(re.escape, re.split(" ?… ?", phrase))))
        for row in rows
        for phrase in re.findall(r"`([^`]+)`", row)
    ]
    found = list(messages())
    assert len(found) > 90
    unknown = [place for place in found if place[1] != "…" and not any(phrase.search(place[1]) for phrase in phrases)]
    assert unknown == []


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    public = set(globe.__all__) - {"__version__"} - ERRORS
    assert {name for name in public if not re.search(rf"^::: [\w.]+\.{name}$", text, re.MULTILINE)} == set()
