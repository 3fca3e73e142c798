"""Models whose experts are coded in few bits: sources with rows of some length, and what is stored of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from globe import CompressConfig
from globe.model.expert_modules import find_experts

E, P, D, LAYERS = 8, 32, 64, 2
ALONE = CompressConfig(bits=3, calibrate="none", allocation="uniform")
"""The weights alone: the model is not run."""


def write_source(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A model of two layers with eight experts of 32 x 64 each, in shards.

    Rows of gate and up suit shared widths and scales, those of down do not; outputs of up have many sizes.
    """
    settings = {
        "moe_intermediate_size": P,
        "num_experts": E,
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "head_dim": 16,
        "intermediate_size": 48,
        "vocab_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model("qwen3_moe", **settings | changes, dtype=dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for found in find_experts(model):  # rows of as many sizes as those of models that were trained
        gate_up, down = found.module.gate_up_proj.data, found.module.down_proj.data
        gate_up *= (0.4 * torch.randn(len(gate_up), 1, 1) + 0.4 * torch.randn(gate_up.shape[2])).exp()
        gate_up.chunk(2, 1)[1].mul_(torch.randn(len(gate_up), gate_up.shape[1] // 2, 1).exp())
        down *= (0.6 * torch.randn(len(down), 1, down.shape[2])).exp()
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return model


def rewrite(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Change tensors, by name, of all files."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def bytes_of_experts(folder: Path) -> int:
    """What the files of a coded model hold besides the source's tensors and the tripwire: from their sizes."""
    total = 0
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        others = [entry for name, entry in header.items() if "globe_" not in name]
        total += len(raw) - 8 - length - sum(end - start for start, end in (e["data_offsets"] for e in others))
    return total
