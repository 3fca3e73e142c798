"""The command that is run; tests/servers runs it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils import import_utils

from globe import compress, export_dense
from globe.cli.main import main
from globe.serve import server
from tests.coded import ALONE, write_source


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A compressed model and its dense export."""
    folder = tmp_path_factory.mktemp("served")
    write_source(folder / "source")
    compress(folder / "source", folder / "small", ALONE)
    return {"small": folder / "small", "dense": export_dense(folder / "small", folder / "dense")}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that this process would have become."""
    found: list[tuple[str, ...]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: found.append(command))
    return found


def install(
    monkeypatch: pytest.MonkeyPatch, *, serving: bool, vllm: bool = False, device: str = "cpu", plugin: bool = True
) -> None:
    """Make servers look installed or not; vLLM on a device, with or without the interfaces of the plugin."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: (vllm or None) if n == "vllm" else find(n, *rest))
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: serving)
    platform = SimpleNamespace(is_unspecified=lambda: device == "none", is_cpu=lambda: device == "cpu")
    modules: dict[str, Any] = {
        "vllm": SimpleNamespace(__version__="0.32.0"),
        "vllm.platforms": SimpleNamespace(current_platform=platform),
        "globe.serve.vllm_plugin": SimpleNamespace() if plugin else None,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


TRANSFORMERS = ("-c", "import globe; from transformers.cli.transformers import main; main()", "serve")
VLLM = ("-m", "vllm.entrypoints.openai.api_server", "--model")
WHOLE = "--enable-expert-parallel"


@pytest.mark.parametrize("name", ["small", "dense"])
def test_transformers_where_there_is_no_vllm(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folders: dict[str, Path],
    started: list[tuple[str, ...]],
    name: str,
) -> None:
    install(monkeypatch, serving=True)
    assert main(["serve", str(folders[name]), "--port", "9000", "-h"]) == 0
    assert started == [(sys.executable, *TRANSFORMERS, str(folders[name]), "--port", "9000", "-h")]
    printed = capsys.readouterr().out
    assert "transformers 5" in printed
    assert f"serve {folders[name]} --port 9000 -h\n" in printed


@pytest.mark.parametrize(
    ("name", "device", "settings"),
    [("small", "cpu", (WHOLE,)), ("small", "cuda", (WHOLE, "--enforce-eager")), ("dense", "cuda", ())],
)
def test_vllm_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
    folders: dict[str, Path],
    started: list[tuple[str, ...]],
    name: str,
    device: str,
    settings: tuple[str, ...],
) -> None:
    install(monkeypatch, serving=True, vllm=True, device=device)
    assert main(["serve", str(folders[name]), "--port", "9000"]) == 0
    assert started == [(sys.executable, *VLLM, str(folders[name]), *settings, "--port", "9000")]


@pytest.mark.parametrize(
    ("found", "reason"), [({"device": "none"}, "no device that it was built for"), ({"plugin": False}, "vllm_plugin")]
)
def test_it_says_why_vllm_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folders: dict[str, Path],
    started: list[tuple[str, ...]],
    found: dict[str, Any],
    reason: str,
) -> None:
    install(monkeypatch, serving=True, vllm=True, **found)
    assert main(["serve", str(folders["small"])]) == 0
    assert started == [(sys.executable, *TRANSFORMERS, str(folders["small"]))]
    said = capsys.readouterr().out
    assert "note: vLLM is installed but cannot serve this model here: " in said
    assert reason in said


def test_without_the_format_the_plugin_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    install(monkeypatch, serving=False, vllm=True, plugin=False)
    assert server.find_server(folders["dense"]).name == "vLLM 0.32.0"


def test_mistakes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folders: dict[str, Path]
) -> None:
    def told(folder: Path) -> str:
        assert main(["serve", str(folder)]) == 1
        return capsys.readouterr().err

    install(monkeypatch, serving=False)
    assert "vLLM is not installed, and" in told(folders["small"])
    assert "pip install 'transformers[serving]'" in told(folders["dense"])
    install(monkeypatch, serving=True)
    assert "does not exist" in told(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "config.json" in told(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in told(Path("nothing"))
