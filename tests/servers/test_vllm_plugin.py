"""The native format in vLLM: greedy continuations of transformers, in less memory than the dense model takes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from globe import CompressConfig, compress
from globe.checkpoint.shipped import MODEL
from globe.measure.texts import read_text
from tests.model import compressed

ROOT = Path(__file__).parents[2]
SERVERS = ROOT / ".venv-servers" / "bin"
NUM_TOKENS = 24
PROMPTS = [[5, 6, 7, 8], [40, 30, 20, 10, 11, 12]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a vLLM beside which this package is installed."""
    assert SERVERS.exists(), "run `make test-servers`, which sets up the servers"
    site = tmp_path_factory.mktemp("site")
    pip = [SERVERS / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", site, ROOT, "entmax"], check=True)
    return os.environ | {"PYTHONPATH": str(site), "VLLM_CPU_KVCACHE_SPACE": "1"}


def served(environment: dict[str, str], model: Path, prompts: list[list[int]], dtype: str = "float32") -> Any:
    """What `native_vllm.py` says of a model."""
    script = Path(__file__).with_name("native_vllm.py")
    command = [SERVERS / "python", script, model, dtype, json.dumps(prompts), str(NUM_TOKENS)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:] + result.stdout[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def text_prompts(model: Path) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(model)(read_text("heldout")[:4000])["input_ids"]
    return [ids[start : start + 32] for start in (0, 300, 600)]


@torch.no_grad()
def greedy(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers continues with, in float32, end of text or not."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    continuations = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        continuations.append(ids[len(prompt) :])
    return continuations


def dense_expert_bytes(path: Path, itemsize: int) -> int:
    config = AutoConfig.from_pretrained(path)
    per_layer = 3 * config.num_experts * config.moe_intermediate_size * config.hidden_size
    return config.num_hidden_layers * per_layer * itemsize


# float32, in which sums in another order change no token; what is in few bits is decoded as in transformers
@pytest.mark.parametrize(("settings", "share"), [({"keep": 0.5, "steps": 10}, 0.6), ({"bits": 3}, 0.2)])
def test_shipped_model(tmp_path: Path, environment: dict[str, str], settings: dict[str, Any], share: float) -> None:
    model = tmp_path / "small"
    compress(MODEL, model, CompressConfig(**settings))
    prompts = text_prompts(model)
    answer = served(environment, model, prompts)
    assert answer["tokens"] == greedy(model, prompts)
    assert answer["expert_bytes"] < share * dense_expert_bytes(model, itemsize=4)


@pytest.mark.parametrize(
    ("model_type", "banks"),
    [("mixtral", "shared_and_own"), ("olmoe", "up_only"), ("qwen3_moe", "middle_layer")],
)
def test_banks_and_families(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, model_type: str, banks: str
) -> None:
    settings = compressed.FAMILY_SETTINGS
    monkeypatch.setitem(settings, model_type, settings[model_type] | {"head_dim": 32})  # what vLLM's attention takes
    monkeypatch.setattr(compressed, "D", 64)
    model = compressed.write_compressed(tmp_path, model_type, compressed.BANK_SETS[banks]).path
    assert served(environment, model, PROMPTS)["tokens"] == greedy(model, PROMPTS)


def test_less_memory_than_dense(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"E": 16, "P": 512, "D": 512}.items():
        monkeypatch.setattr(compressed, name, value)
    monkeypatch.setitem(
        compressed.FAMILY_SETTINGS,
        "qwen2_moe",
        {"moe_intermediate_size": 512, "num_experts": 16, "shared_expert_intermediate_size": 8},
    )
    small = compressed.write_compressed(tmp_path, "qwen2_moe", compressed.PER_LAYER)
    small.dense.save_pretrained(tmp_path / "dense")
    answer, dense = (served(environment, path, PROMPTS) for path in (small.path, tmp_path / "dense"))
    assert answer["tokens"] == dense["tokens"]
    expert_bytes = dense_expert_bytes(small.path, itemsize=4)
    assert answer["expert_bytes"] < 0.05 * expert_bytes
    assert answer["resident_bytes"] < dense["resident_bytes"] - 0.5 * expert_bytes


def test_over_http(tmp_path: Path, environment: dict[str, str]) -> None:
    model = tmp_path / "small"
    compress(MODEL, model, CompressConfig(keep=0.5, steps=10))
    prompt = text_prompts(model)[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; vllm-cpu's own `vllm` looks for the version of a package called vllm, and stops
    command = [SERVERS / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port)]
    asked = {"model": str(model), "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    log = (tmp_path / "log").open("w")
    with log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server:
        try:
            while not answers(port):
                assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
                time.sleep(1)
            with urllib.request.urlopen(request) as response:
                text = json.load(response)["choices"][0]["text"]
        finally:
            server.terminate()
    assert text == AutoTokenizer.from_pretrained(model).decode(greedy(model, [prompt])[0])


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
            return response.status == 200
    except OSError:
        return False
