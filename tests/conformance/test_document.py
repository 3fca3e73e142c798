from __future__ import annotations

from tests.conformance.document import PATH, REFUSED, REFUSED_METHODS, document


def test_the_page_on_families_is_current() -> None:
    page = document()
    assert PATH.read_text() == page, "run `python -m tests.conformance.document`"
    refusals = page.partition("## Refused")[2]
    assert refusals.count("\n| ") == 1 + len(REFUSED) + len(
        REFUSED_METHODS
    )  # the head of the table, and each was refused
