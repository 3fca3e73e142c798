"""Compressed models that the servers and tools are given, all of the model that ships with GloBE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from globe import CompressConfig, compress
from globe.checkpoint.shipped import MODEL


def shipped(folder: Path, **changes: Any) -> Path:
    """The shipped model, its configuration changed, compressed."""
    shutil.copytree(MODEL, folder / "source")
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "source" / "config.json").write_text(json.dumps(config | changes))
    compress(folder / "source", folder / "small", CompressConfig(keep=0.75, steps=10))
    return folder / "small"


def random_qwen3(folder: Path) -> Path:
    """A small Qwen3-MoE of random weights, with the shipped model's tokenizer, compressed."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.1,  # large enough for every expert to matter
        bos_token_id=0,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "source")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "source")
    compress(folder / "source", folder / "small", CompressConfig(keep=0.75, steps=10))
    return folder / "small"
