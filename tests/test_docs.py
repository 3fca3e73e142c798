"""What the documentation says of the code, held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import globe
from globe import errors

ROOT = Path(__file__).parents[1]
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    public = set(globe.__all__) - {"__version__"} - ERRORS
    assert {name for name in public if not re.search(rf"^::: [\w.]+\.{name}$", text, re.MULTILINE)} == set()
