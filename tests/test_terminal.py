from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from globe.cli.ending import tell
from globe.cli.main import main
from globe.errors import CheckpointError
from globe.terminal import Terminal, one_line, tame_logging, visible
from tests.tiny_sources import write_source

HOSTILE = "[/x][red]a[/red] :smile: \x1b[2J\x1b]0;title\x07 \r\b\x9b31m \u202eabc\u2066 \udcff"
SHOWN = r"[/x][red]a[/red] :smile: \x1b[2J\x1b]0;title\x07 \r\x08\x9b31m \u202eabc\u2066 \udcff"


def printed(*renderables: object, width: int = 200) -> str:
    terminal = Terminal(file=io.StringIO(), width=width, color_system=None)
    terminal.print(*renderables)
    return terminal.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_no_text_is_shown_by_its_escape() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("Brücke – 5 €\n\tनि‍ 👩‍🚀") == "Brücke – 5 €\n\tनि‍ 👩‍🚀"
    assert one_line(" a\n  b\u2028c\r\nd \x1b ") == r"a b c d \x1b"


def test_a_terminal_shows_text_wherever_it_is() -> None:
    assert printed(HOSTILE) == SHOWN + "\n"
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    shown = printed(table)
    assert shown.count(SHOWN) == 4
    assert len({len(line) for line in shown.splitlines() if line.startswith(("┃", "│", "└"))}) == 1
    assert "\x1b" not in printed(Text(HOSTILE), Panel(HOSTILE, title=Text("\x1b[2J")))


def test_a_display_that_is_alive_too() -> None:
    terminal = Terminal(file=io.StringIO(), force_terminal=True, width=200, color_system=None, legacy_windows=False)
    with Progress(TextColumn("{task.description}", markup=False), console=terminal) as progress:
        progress.add_task("[/x] \x1b]0;title\x07 \u202e")
    shown = terminal.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert r"[/x] \x1b]0" in shown
    assert "\x1b]0" not in shown
    assert "\u202e" not in shown


def test_errors_are_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    tell("error", str(CheckpointError("a [/b]\nerror: all is well \x1b[8m")))
    assert capsys.readouterr().err == "error: a [/b] error: all is well \\x1b[8m\n"


def test_warnings_of_transformers_are_escaped() -> None:
    tame_logging()
    logger = logging.get_logger("transformers.test")
    handler = logging.get_logger().handlers[0]
    stream, handler.stream = handler.stream, io.StringIO()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        logger.warning("model of type %s", HOSTILE)
        assert f"model of type {SHOWN}" in handler.stream.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        handler.stream = stream  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["[/x]", "a $x_1$ [bold]b", "\x1b[2J\u202e\a"])
def test_every_command_takes_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    source, out = tmp_path / f"{name} source", tmp_path / f"{name} out"
    write_source(source)
    fast = ("--steps", "2", "--keep", "0.7", "--calibrate", "none", "--allocation", "uniform")
    assert main(["compress", str(source), "-o", str(out), *fast]) == 0
    assert main(["inspect", str(source), *fast]) == 0
    assert main(["inspect", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    (out / "LICENSE").symlink_to("/etc/hostname")
    assert main(["export", str(out), "-o", str(tmp_path / f"{name} dense")]) == 0
    assert main(["evaluate", str(out)]) == 1  # without a tokenizer
    assert main(["sweep", str(tmp_path / f"{name} none\udcff"), "-o", str(out)]) == 1
    shown = capsys.readouterr()
    assert "LICENSE is a link to /etc/hostname, outside the folder, and is left out" in shown.out
    for text in (shown.out, shown.err, (out / "report.html").read_text()):
        assert visible(name) in text or "&" in text
        assert not set("\x1b\a\u202e\udcff") & set(text)


def test_what_a_configuration_and_a_report_say_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "x[/y]\x1b[2J\u202e"}))
    assert main(["inspect", str(tmp_path / "source")]) == 1
    path.write_text(json.dumps({**config, "transformers_weights": "[/y]\x1b[2J\u202e\ud800"}))
    assert main(["inspect", str(tmp_path / "source")]) == 1
    shown = capsys.readouterr()
    assert not set("\x1b\u202e") & set(shown.out + shown.err)
