"""What of the vLLM plugin shows without vLLM: that the package offers it. tests/servers runs it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_package_offers_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["globe"].split(":")
    source = ROOT / Path(*module.split(".")).with_suffix(".py")
    assert function in [node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_it_says_that_vllm_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        importlib.import_module("globe.serve.vllm_plugin")
