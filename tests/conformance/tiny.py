"""Tiny real checkpoints of the families, in each layout that occurs on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Llama4ForConditionalGeneration,
    PreTrainedModel,
)

from tests.conformance.families import COMPOSITES, SETTINGS, settings

IDS = torch.tensor([[3, 5, 7, 11, 13, 17, 19, 23], [29, 31, 37, 41, 43, 47, 4, 6]])


@dataclasses.dataclass(frozen=True)
class Case:
    """A family in one of its on-disk layouts."""

    family: str
    """As the suite calls it: transformers' model type."""
    layout: str
    """saved: the names and shards that save_pretrained writes, which are the released models'; fused: the names of
    transformers' own modules, in one file."""

    def __str__(self) -> str:
        return f"{self.family}-{self.layout}"


CASES = [Case(family, layout) for family in (*SETTINGS, *COMPOSITES) for layout in ("saved", "fused")]


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model with random weights, every tensor of it different from its initial value."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**settings(family), **changes}, dtype=dtype)
    model = auto_class(family).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.1)
    return model


def write(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Write the case's checkpoint; returns the model."""
    model = tiny_model(case.family, dtype)
    if case.layout == "saved":
        model.save_pretrained(folder, max_shard_size="20KB")
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Of a model of text and pictures, too, given text alone."""
    if isinstance(model, Llama4ForConditionalGeneration):
        model = model.language_model  # all that text passes through; transformers 5.24.0 fails after it
    return model(input_ids=IDS, use_cache=False).logits


def auto_class(family: str) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """What builds and loads the whole of a model."""
    return AutoModelForImageTextToText if family in COMPOSITES else AutoModelForCausalLM


def load(folder: Path, family: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model of a family, or, without one, its language model."""
    return (AutoModelForCausalLM if family is None else auto_class(family)).from_pretrained(folder, dtype=dtype).eval()
