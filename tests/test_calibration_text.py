"""The text in the package: a fair share of each part, and nothing of what models are judged on."""

from __future__ import annotations

import runpy
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest

from globe.measure.texts import read_text


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "make_calibration_text.py")))


@pytest.mark.parametrize("judged", ["heldout", "topics"])
def test_no_line_is_of_what_models_are_judged_on(judged: str) -> None:
    text = read_text("heldout") if judged == "heldout" else "\n".join(topics.values())
    lines = {line.strip() for line in text.splitlines()}
    shared = [line for line in read_text("calibration").splitlines() if len(line) > 50 and line.strip() in lines]
    assert shared == []


PROSE = ("whale", "Congress", "Menschenrechte", "derechos", r"\frac{")
CODE = ("self.", "require(", "export class", "public class", "impl<", "func ", "#define", "namespace")


@pytest.mark.parametrize("sign", PROSE + CODE)
def test_the_beginning_has_every_part(sign: str) -> None:
    assert sign in read_text("calibration", 65_000)


def test_passages_are_whole_paragraphs_or_words_of_the_text_in_order(script: SimpleNamespace) -> None:
    least, most = script.LENGTH
    text = "\n\n".join(" ".join(f"{number}.{word}" for word in range(37 * number % 1500)) for number in range(100))
    found = script.passages(text)
    assert all(least - 2 <= len(passage) <= most for passage in found)
    places = [text.index(passage) for passage in found]
    assert places == sorted(places)
    assert sum(map(len, found)) > 0.9 * len(text)


def test_rounds_take_the_share_of_every_part(script: SimpleNamespace) -> None:
    found = [
        [f"{place}.{number}" for number in range(script.ROUNDS * part.share)] for place, part in enumerate(script.PARTS)
    ]
    mixed = script.mixed(found).split()
    assert sorted(mixed) == sorted(passage for own in found for passage in own)
    size = sum(part.share for part in script.PARTS)
    assert [passage.partition(".")[0] for passage in mixed[:size]] == [
        str(place) for place, part in enumerate(script.PARTS) for _ in range(part.share)
    ]
