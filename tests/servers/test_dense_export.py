"""The dense export, served: greedy continuations equal those of transformers on the exported model."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from globe import export_dense
from globe.measure.texts import read_text
from tests.servers.exports import random_qwen3, shipped

SERVERS = Path(__file__).parents[2] / ".venv-servers" / "bin" / "python"
NUM_TOKENS = 24


def shipped_without_normalised_router(folder: Path) -> Path:
    """llama.cpp never normalises the router's weights of a Qwen2-MoE, so the configuration must not ask for it."""
    return shipped(folder, norm_topk_prob=False)


def prompts(model: Path) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(model)(read_text("heldout")[:4000])["input_ids"]
    return [ids[start : start + 32] for start in (0, 300, 600)]


@torch.no_grad()
def greedy(path: Path) -> list[list[int]]:
    """What transformers continues with, in float32, end of text or not."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    continuations = []
    for prompt in prompts(path):
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        continuations.append(ids[len(prompt) :])
    return continuations


def served(script: str, model: Path) -> Any:
    command = [SERVERS, Path(__file__).with_name(script), model, json.dumps(prompts(model)), str(NUM_TOKENS)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("compressed", [shipped, random_qwen3])
def test_vllm(tmp_path: Path, compressed: Callable[[Path], Path]) -> None:
    model = export_dense(compressed(tmp_path), tmp_path / "dense")
    assert served("greedy_vllm.py", model) == greedy(model)


@pytest.mark.parametrize("compressed", [shipped_without_normalised_router, random_qwen3])
def test_llama_cpp(tmp_path: Path, compressed: Callable[[Path], Path]) -> None:
    model = export_dense(compressed(tmp_path), tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert served("greedy_llama_cpp.py", model) == [tokenizer.decode(ids) for ids in greedy(model)]


@pytest.fixture(autouse=True)
def _needs_the_servers() -> None:
    assert SERVERS.exists(), "run `make test-servers`, which sets up the servers"
