"""Tiny dense checkpoints of every family, in both on-disk layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.model.compressed import tiny_model


def write_source(
    folder: Path, model_type: str = "qwen2_moe", layout: str = "per_expert", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Write a tiny model: `per_expert` as save_pretrained does, in shards; `fused` under transformers' own names."""
    model = tiny_model(model_type, dtype)
    if layout == "per_expert":
        model.save_pretrained(folder, max_shard_size="20KB")
    else:
        model.config.save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return model


def write_tokenizer(folder: Path, letters: str) -> None:
    """A tokenizer that gives each letter its place in `letters`; what is not among them is the first of them."""
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=letters[0]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=letters[0]).save_pretrained(folder)
