"""What rounding to llama.cpp's types loses, asked of llama.cpp's own quantiser."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from globe.plan.ggml_types import types_for

SERVERS = Path(__file__).parents[2] / ".venv-servers" / "bin" / "python"


def test_types_lose_what_the_plan_thinks() -> None:
    assert SERVERS.exists(), "run `make test-servers`, which sets up the servers"
    told = {each.name: each.noise for num_inputs in (256, 32) for each in types_for(num_inputs)}
    command = [SERVERS, Path(__file__).with_name("ggml_noise.py"), *told]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx(told, rel=0.02)
