"""Outputs in the format of compressed-tensors, read by those who know nothing of GloBE: vLLM, and transformers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from globe import CompressConfig, compress
from globe.checkpoint.report import Report
from globe.checkpoint.shipped import MODEL
from globe.measure.texts import read_text
from globe.model.loading import load

SERVERS = Path(__file__).parents[2] / ".venv-servers"
ALONE = CompressConfig(format="compressed-tensors", calibrate="none", allocation="uniform")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in 4 bits: none of vLLM's kernels for CPUs takes 8."""
    folder = tmp_path_factory.mktemp("packed") / "small"
    compress(MODEL, folder, ALONE)
    return folder


def texts() -> Tensor:
    ids = AutoTokenizer.from_pretrained(MODEL)(read_text("heldout")[:8000])["input_ids"]
    return torch.tensor([ids[start : start + 200] for start in (0, 400, 800, 1200)])


@torch.no_grad()
def scores(path: Path) -> Tensor:
    """Log probabilities that transformers gives the texts in float32, dequantised as it loads."""
    model, ids = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), texts()
    return model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)


def test_vllm_serves_it(packed: Path) -> None:
    said = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "amx_int8" not in said and not ("AuthenticAMD" in said and "avx512" in said):
        pytest.skip("vLLM's kernels of mixtures in int4 need a CPU with AMX, or AMD's with AVX-512")
    command = [
        SERVERS / "bin" / "python",
        Path(__file__).with_name("scores_vllm.py"),
        packed,
        json.dumps(texts().tolist()),
    ]
    # zentorch apart from the rest of the servers' environment, which it changes
    environment = os.environ | {"PYTHONPATH": str(SERVERS / "zen")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    served, meant = torch.tensor(json.loads(result.stdout.splitlines()[-1])), scores(packed)
    assert float((served - meant).abs().mean()) < 0.04  # the kernel rounds activations to 8 bits
    assert float(served.mean()) == pytest.approx(float(meant.mean()), abs=0.01)


def test_vllm_finds_the_width_of_each_layer(tmp_path: Path) -> None:
    """Which is as far as a machine without a GPU can go."""
    compress(MODEL, tmp_path / "mixed", dataclasses.replace(ALONE, bits=7))
    report = Report.read(tmp_path / "mixed")
    script = """
import json, sys, torch
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
config = CompressedTensorsConfig.from_config(json.load(open(sys.argv[1]))["quantization_config"])
parts = "mlp.experts.3.down_proj", "self_attn.q_proj"
names = [f"model.layers.{layer}.{part}" for layer in range(14) for part in parts]
found = [config.get_scheme_dict(torch.nn.Linear(1, 1), name) for name in names]
print(json.dumps([None if scheme is None else scheme["weights"].num_bits for scheme in found]))
"""
    command = [SERVERS / "bin" / "python", "-c", script, tmp_path / "mixed" / "config.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    widths = [int(part.expert_widths[0]) for part in report.coded if part.family == "down"]
    assert {*widths} == {4, 8}
    assert json.loads(result.stdout.splitlines()[-1]) == [entry for width in widths for entry in (width, None)]


def test_transformers_loads_the_same_experts(packed: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).state_dict()
    ours = load(packed, dtype=torch.float32).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].bfloat16(), ours[name].bfloat16()) for name in ours)


def test_transformers_stops_at_several_widths(tmp_path: Path) -> None:
    """It reads all experts by one group of config.json: with the other order of groups it would read noise."""
    compress(MODEL, tmp_path / "mixed", CompressConfig(bits=7, format="compressed-tensors", calibrate="none"))
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
