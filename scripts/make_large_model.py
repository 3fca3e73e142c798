"""Make a model with the layers of Qwen3-30B-A3B and random weights, as large as is asked for.

    python scripts/make_large_model.py --output runs/large --layers 12

It is for measuring time and memory: of 12 layers with 128 experts it takes 16 GB, and with all 48 as much as the
original. Experts have a planted spectrum, so that there is something to code; the text it writes means nothing. The
tokenizer is that of the model that ships with GloBE. A layer at a time is in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import tyro
from torch import Tensor
from transformers import Qwen3MoeConfig

from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.checkpoint.side_files import CONFIG
from globe.checkpoint.tensor_files import save_tensors
from globe.checkpoint.writer import copy_side_files, make_folder, write_index, write_json

DECAY = 0.5
"""The standard deviation along the k-th input direction is k to the power of minus this."""


@dataclasses.dataclass(frozen=True)
class LargeModel:
    """How large the model is."""

    output: Path
    """Folder to write."""
    layers: int = 48
    """Decoder layers."""
    experts: int = 128
    """Experts of each layer; a token is routed to a sixteenth of them, at least two."""
    vocabulary: int = 151_936
    """Tokens."""
    seed: int = 0
    """Seeds the weights."""

    def model(self) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=self.layers,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=self.experts,
            num_experts_per_tok=max(2, self.experts // 16),
            norm_topk_prob=True,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
            architectures=["Qwen3MoeForCausalLM"],
            dtype="bfloat16",
        )


def make_large_model(config: LargeModel) -> Path:
    """Write the model, unless it is there already; returns its folder."""
    folder = config.output
    if (folder / CONFIG).exists():
        return folder
    make_folder(folder)
    model, generator = config.model(), torch.Generator().manual_seed(config.seed)
    files = [f"model-{number + 1:05d}-of-{config.layers + 1:05d}.safetensors" for number in range(config.layers + 1)]
    weight_map, total = dict[str, str](), 0
    directions = torch.linalg.qr(torch.randn(2048, 2048, generator=generator))[0]
    for number, file in enumerate(files):
        tensors = dict(
            _layer(model, number, directions, generator) if number < config.layers else _rest(model, generator)
        )
        save_tensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder, weight_map, total)
    copy_side_files(open_checkpoint(resolve_model("shipped")), folder, leave_out=("README.md", "training.json"))
    write_json(folder / CONFIG, model.to_dict())
    return folder


def _layer(
    model: Qwen3MoeConfig, number: int, directions: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    D, P, stem = model.hidden_size, model.moe_intermediate_size, f"model.layers.{number}"
    width = model.num_attention_heads * model.head_dim
    narrow = model.num_key_value_heads * model.head_dim
    for name, shape in {"q": (width, D), "k": (narrow, D), "v": (narrow, D), "o": (D, width)}.items():
        yield f"{stem}.self_attn.{name}_proj.weight", _normal(shape, generator)
    for name, size in {
        "self_attn.q_norm": model.head_dim,
        "self_attn.k_norm": model.head_dim,
        "input_layernorm": D,
        "post_attention_layernorm": D,
    }.items():
        yield f"{stem}.{name}.weight", torch.ones(size, dtype=torch.bfloat16)
    yield f"{stem}.mlp.gate.weight", _normal((model.num_experts, D), generator)
    spectrum = torch.arange(1, D + 1).pow(-DECAY)
    planted = (spectrum * D**0.5 / spectrum.norm())[:, None] * directions
    for expert in range(model.num_experts):
        for name in ("gate", "up", "down"):
            weights = torch.randn(P, D, generator=generator) @ planted / D**0.5
            yield (
                f"{stem}.mlp.experts.{expert}.{name}_proj.weight",
                (weights.T if name == "down" else weights).to(torch.bfloat16).contiguous(),
            )


def _rest(model: Qwen3MoeConfig, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", _normal((model.vocab_size, model.hidden_size), generator)
    yield "model.norm.weight", torch.ones(model.hidden_size, dtype=torch.bfloat16)
    yield "lm_head.weight", _normal((model.vocab_size, model.hidden_size), generator)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of a linear layer that keeps the size of what it is given."""
    return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)


if __name__ == "__main__":
    print(make_large_model(tyro.cli(LargeModel)))
