"""The experts of a model as stacks, one for each layer and family: what every method of compression is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import root_mean_square
from globe.checkpoint.stacks import read_family
from globe.model.configuration import expert_layers
from globe.model.expert_modules import factor_names
from globe.terms import FAMILIES, Family

Stacks = Mapping[tuple[int, Family], Tensor]
"""Experts (E, P, D) by layer and family, float32; `down` is transposed."""


@dataclasses.dataclass(frozen=True)
class Approximation:
    """Experts rebuilt from what a method stores, and what that costs."""

    stacks: Stacks
    """What (E, P, D), composed in float32 from factors rounded to the precision they are stored in."""
    stored_parameters: int
    shape: str
    """Ranks and numbers of bases, in words."""
    seconds: float
    """Spent on fitting."""
    kept_experts: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)
    """The experts left in each layer of a method that removes some, ascending; the others get no token any more."""
    bits: float | None = None
    """Stored bits of a weight, everything counted, of a method that is given a budget of bits."""


def read_stacks(model: str | Path, layers: Collection[int] | None) -> tuple[Stacks, torch.dtype]:
    """The routed experts of a checkpoint's `layers` (None: all), and the precision they are stored in."""
    checkpoint = open_checkpoint(model)
    found = [layer for layer in expert_layers(checkpoint) if layers is None or layer.index in layers]
    stacks = {
        (layer.index, family): read_family(checkpoint, layer, family).float() for layer in found for family in FAMILIES
    }
    return stacks, TORCH_DTYPES[found[0].dtype]


@torch.no_grad()
def write_stacks(model: Any, stacks: Stacks) -> None:
    """Replace experts of a transformers model in place: gate_up_proj (E, 2P, D) = [gate; up], down_proj (E, D, P)."""
    paths = factor_names(model).experts
    for (layer, family), stack in stacks.items():
        experts = model.get_submodule(paths[layer])
        if family == "down":
            experts.down_proj.copy_(stack.mT)
        else:
            experts.gate_up_proj.chunk(2, dim=1)[0 if family == "gate" else 1].copy_(stack)


@torch.no_grad()
def remove_experts(model: Any, kept: Mapping[int, Tensor]) -> None:
    """Leave a transformers model, in place, only the `kept` experts of each layer, and their rows of the router.

    The router is the module `gate` beside the experts, with one row for each of them, as in Qwen, Mixtral and OLMoE.
    """
    paths = factor_names(model).experts
    for layer, experts in kept.items():
        router = model.get_submodule(f"{paths[layer].rpartition('.')[0]}.gate")
        router.top_k = min(router.top_k, len(experts))
        for module in (router, model.get_submodule(paths[layer])):
            module.num_experts = len(experts)
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter[experts], requires_grad=False))


def as_inputs(experts: Tensor, family: Family) -> Tensor:
    """Experts (E, P, D) as (E, N inputs, K outputs), and back."""
    return experts if family == "down" else experts.mT


def family_errors(stacks: Stacks, approximation: Stacks) -> dict[str, float]:
    """Root mean square of the layers' relative Frobenius errors: over all families (`error`) and by family."""
    errors = {key: float((stack - approximation[key]).norm() / stack.norm()) for key, stack in stacks.items()}
    by_family = {
        family: root_mean_square(error for key, error in errors.items() if key[1] == family) for family in FAMILIES
    }
    return {"error": root_mean_square(errors.values()), **by_family}
