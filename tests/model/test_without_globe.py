from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fresh_process import FreshProcess
from tests.model.conftest import Make

LOAD = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1]); print('loaded')"


@pytest.mark.parametrize(("model_type", "banks"), [("mixtral", "down_only"), ("qwen2_moe", "per_layer")])
def test_stock_transformers_stops_at_the_tripwire(
    fresh: FreshProcess, compressed: Make, model_type: str, banks: str
) -> None:
    """It would otherwise fill the experts with random numbers and go on."""
    result = fresh.run(LOAD, compressed(model_type, banks).path)
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    assert "MISMATCH" in result.stderr
    assert f"layers.0.mlp.experts.{'down_proj' if banks == 'down_only' else 'gate_up_proj'}" in result.stderr


def test_importing_globe_is_all_it_takes(compressed: Make) -> None:
    command = [sys.executable, "-c", f"import globe; {LOAD}", str(compressed("qwen2_moe", "per_layer").path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "loaded\n"
