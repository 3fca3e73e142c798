"""`globe serve` where vLLM is not installed: what transformers' server answers is what `generate` gives."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from globe import CompressConfig, compress, export_dense
from globe.checkpoint.shipped import MODEL
from tests.servers.over_http import complete, serving

NUM_TOKENS = 16
PROMPTS = ["import os\n", "def read(self, size=-1):\n", "class Error(Exception):\n"]

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="transformers[serving] is not installed")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, coded."""
    folder = tmp_path_factory.mktemp("served") / "small"
    compress(MODEL, folder, CompressConfig(bits=4, calibrate="none", allocation="uniform"))
    return folder


@torch.no_grad()
def continued(path: Path) -> list[str]:
    """What transformers makes of each prompt by itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    found: list[str] = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.append(tokenizer.decode(ids, skip_special_tokens=True))
    return found


@pytest.mark.parametrize("is_dense", [False, True])
def test_over_http(tmp_path: Path, small: Path, is_dense: bool) -> None:
    model = export_dense(small, tmp_path / "dense") if is_dense else small
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with serving([sys.executable, "-m", "globe", "serve", model], environment, tmp_path / "log") as address:
        assert complete(address, model, PROMPTS, NUM_TOKENS) == continued(model)
    assert f"serves the model {model}" in (tmp_path / "log").read_text()
