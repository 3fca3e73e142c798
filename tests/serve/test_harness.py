from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from globe.cli.main import main


def test_the_arguments_are_those_of_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    command = SimpleNamespace(cli_evaluate=lambda: seen.append(list(sys.argv)))
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", command)
    before = list(sys.argv)
    assert main(["lm-eval", "--model", "hf", "--model_args", "pretrained=DIR", "--tasks", "x", "-h"]) == 0
    assert seen == [["lm-eval", "--model", "hf", "--model_args", "pretrained=DIR", "--tasks", "x", "-h"]]
    assert sys.argv == before


def test_without_lm_eval_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "--tasks", "x"]) == 1
    assert "pip install 'lm-eval[hf]'" in capsys.readouterr().err
