"""Models whose experts are coded in few bits: sources with rows of some length, and what is stored of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from globe import CompressConfig
from globe.model import find_experts

E, P, D, LAYERS = 8, 32, 64, 2
ALONE = CompressConfig(bits=3, calibrate="none", allocation="uniform")
"""The weights alone: the model is not run."""


def write_source(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A model of two layers with eight experts of 32 x 64 each, in shards."""
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
        for parameter in (found.module.gate_up_proj, found.module.down_proj):
            sizes = 0.4 * torch.randn(len(parameter), 1, 1) + 0.4 * torch.randn(parameter.shape[2])
            parameter.data *= sizes.exp()
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return model


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
