"""The native format in vLLM: greedy continuations of transformers, in less memory than the dense model takes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from globe import CompressConfig, compress
from globe.checkpoint.shipped import MODEL
from globe.measure.texts import read_text
from tests.model import compressed
from tests.servers.over_http import complete, serving

ROOT = Path(__file__).parents[2]
SERVERS = ROOT / ".venv-servers" / "bin"
NUM_TOKENS = 24
PARALLEL = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
PROMPTS = [[5, 6, 7, 8], [40, 30, 20, 10, 11, 12]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a vLLM beside which this package is installed."""
    assert SERVERS.exists(), "run `make test-servers`, which sets up the servers"
    site = tmp_path_factory.mktemp("site")
    pip = [SERVERS / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", site, ROOT, "entmax", "tyro", "typeguard"], check=True)
    return os.environ | {"PYTHONPATH": str(site), "VLLM_CPU_KVCACHE_SPACE": "1"}


def served(environment: dict[str, str], model: Path, prompts: list[list[int]], **settings: Any) -> Any:
    """What `native_vllm.py` says of a model."""
    script = Path(__file__).with_name("native_vllm.py")
    command = [SERVERS / "python", script, model, "float32", json.dumps(prompts), str(NUM_TOKENS), json.dumps(settings)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:] + result.stdout[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def text_prompts(model: Path) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(model)(read_text("heldout")[:4000])["input_ids"]
    return [ids[start : start + 32] for start in (0, 300, 600)]


def greedy(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers continues with, in float32, end of text or not."""
    return continued(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), prompts)


@torch.no_grad()
def continued(model: Any, prompts: list[list[int]]) -> list[list[int]]:
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
    assert answer["expert_bytes"][0] < share * dense_expert_bytes(model, itemsize=4)


# vLLM's own dense experts, which a layer without banks has, do not run in several processes of its CPU build
@pytest.mark.parametrize(
    ("model_type", "banks", "settings"),
    [
        ("mixtral", "shared_and_own", {}),
        ("mixtral", "shared_and_own", PARALLEL),
        ("olmoe", "up_only", {}),
        ("olmoe", "up_only", PARALLEL),
        ("qwen3_moe", "middle_layer", {}),
    ],
)
def test_banks_and_families(
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    banks: str,
    settings: dict[str, Any],
) -> None:
    """With five experts, of which the second process has two."""
    monkeypatch.setattr(compressed, "E", 5)
    number = "num_local_experts" if model_type == "mixtral" else "num_experts"
    family = compressed.FAMILY_SETTINGS[model_type] | {"head_dim": 32, number: 5}  # vLLM's attention takes 32
    monkeypatch.setitem(compressed.FAMILY_SETTINGS, model_type, family)
    monkeypatch.setattr(compressed, "D", 64)
    model = compressed.write_compressed(tmp_path, model_type, compressed.BANK_SETS[banks]).path
    assert served(environment, model, PROMPTS, **settings)["tokens"] == greedy(model, PROMPTS)


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
    assert answer["expert_bytes"][0] < 0.05 * expert_bytes
    assert answer["resident_bytes"] < dense["resident_bytes"] - 0.5 * expert_bytes


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, coded."""
    folder = tmp_path_factory.mktemp("coded") / "small"
    compress(MODEL, folder, CompressConfig(bits=4, calibrate="none", allocation="uniform"))
    return folder


def test_every_process_has_its_own_experts(environment: dict[str, str], coded: Path) -> None:
    prompts = text_prompts(coded)
    one, two = served(environment, coded, prompts), served(environment, coded, prompts, **PARALLEL)
    assert two["tokens"] == one["tokens"] == greedy(coded, prompts)
    whole = one["expert_bytes"][0]
    assert two["expert_bytes"] == pytest.approx([whole / 2] * 2, rel=0.02)  # what inputs share is in both


def test_parts_of_experts_are_refused(environment: dict[str, str], coded: Path) -> None:
    with pytest.raises(AssertionError, match="give --enable-expert-parallel"):
        served(environment, coded, PROMPTS, tensor_parallel_size=2)


def test_chunked_prefill_and_prefix_caching(environment: dict[str, str], coded: Path) -> None:
    first, second, _ = text_prompts(coded)
    prompts = [first + second[:4], first + second[4:8], first[:10] + second[:20]]
    settings = {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "max_num_seqs": 1, "block_size": 32}
    answer = served(environment, coded, prompts, enable_prefix_caching=True, **settings)
    assert answer["tokens"] == greedy(coded, prompts)


def test_lora_on_attention(tmp_path: Path, environment: dict[str, str], coded: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(coded, dtype=torch.float32).eval()
    prompts, rank, tensors = text_prompts(coded), 8, dict[str, torch.Tensor]()
    plain = continued(model, prompts)
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            first, second = torch.randn(rank, module.in_features), 0.1 * torch.randn(module.out_features, rank)
            module.weight.data += second @ first
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": first,
                f"base_model.model.{name}.lora_B.weight": second,
            }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    targets = {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": ["qkv_proj"]}
    answer = served(environment, coded, prompts, adapter=str(tmp_path), **targets)
    assert answer["tokens"] == continued(model, prompts) != plain


def test_lora_on_experts_is_refused(environment: dict[str, str], coded: Path) -> None:
    with pytest.raises(AssertionError, match="do not support LoRA on experts"):
        served(environment, coded, PROMPTS, enable_lora=True)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_over_http(tmp_path: Path, environment: dict[str, str], coded: Path, num_processes: int) -> None:
    tokenizer, prompts = AutoTokenizer.from_pretrained(coded), text_prompts(coded)[:2]
    settings = ["--dtype", "float32", "--max-model-len", "256", "--tensor-parallel-size", num_processes]
    command = [SERVERS / "python", "-m", "globe", "serve", coded, *settings]
    with serving(command, environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, tmp_path / "log") as address:
        texts = complete(address, coded, prompts, NUM_TOKENS, ignore_eos=True)
    assert "vLLM 0.32" in (tmp_path / "log").read_text()
    assert texts == [tokenizer.decode(ids) for ids in greedy(coded, prompts)]
