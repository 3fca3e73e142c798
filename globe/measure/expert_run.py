"""Routed experts run one by one, of every family with its own gate function, for what is measured of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from globe.checkpoint.gate_up import split_gate_up
from globe.model.expert_modules import ExpertsLayout
from globe.model.experts import usual_gate


@dataclasses.dataclass(frozen=True)
class ExpertRun:
    """One expert on its tokens, float32."""

    activations: Tensor
    """h = act(gate x, up x), (T, P)."""
    by_gate: Tensor
    """∂h/∂(gate x), (T, P): the gate function acts element by element."""
    by_up: Tensor
    """∂h/∂(up x), (T, P)."""
    outputs: Tensor
    """down h, (T, D)."""
    down: Tensor
    """W_down transposed, (P, D)."""


@torch.enable_grad()
def run_expert(module: Any, layout: ExpertsLayout, expert: int, x: Tensor) -> ExpertRun:
    """Run one expert of an experts module of transformers on tokens x (T, D), with its family's own gate function."""
    own = _expert(module, layout, expert, torch.float32)
    before = (x.detach().float() @ own.gate_up + own.gate_up_bias).requires_grad_()
    h = _gated(module, before)
    (slope,) = torch.autograd.grad(h.sum(), before)
    by_gate, by_up = split_gate_up(slope, 1, interleaved=not layout.is_concatenated)
    return ExpertRun(h.detach(), by_gate, by_up, h.detach() @ own.down + own.down_bias, own.down)


def inner_units(module: Any, layout: ExpertsLayout, expert: int, x: Tensor) -> Tensor:
    """h = act(gate x, up x) (T, P) of one expert on tokens x (T, D), with its family's own gate function."""
    own = _expert(module, layout, expert, torch.float32)
    return _gated(module, x.float() @ own.gate_up + own.gate_up_bias)


def run_experts(
    module: Any,
    layout: ExpertsLayout,
    arguments: tuple[Tensor, ...],
    on_gradient: Callable[[int, str, Tensor, Tensor], None],
) -> Tensor:
    """What the forward of an experts module returns, computed expert by expert.

    A backward pass tells, of each expert that was run, the inputs (T, N) of `gate_up_proj` and of `down_proj` and the
    gradient (T, K) of their outputs, from which the gradient of the matrix, their product, need not be made.
    """
    x, chosen, weights = routed_tokens(layout, arguments)
    outputs = x * weights.where(chosen >= layout.num_experts, 0).sum(1, keepdim=True)
    for expert in range(layout.num_experts):
        token, place = torch.where(chosen == expert)
        if not len(token):
            continue
        own, inputs = _expert(module, layout, expert, x.dtype), x[token]
        before = inputs @ own.gate_up + own.gate_up_bias
        if not before.requires_grad:
            before.requires_grad_()
        h = _gated(module, before)
        output = h @ own.down + own.down_bias
        before.register_hook(functools.partial(on_gradient, expert, "gate_up_proj", inputs.detach()))
        output.register_hook(functools.partial(on_gradient, expert, "down_proj", h.detach()))
        outputs = outputs.index_add(0, token, weights[token, place, None] * output)
    if not layout.presorted:
        return outputs
    (repeated,) = arguments
    return torch.zeros_like(repeated).index_put((repeated.any(dim=1),), outputs)


@dataclasses.dataclass(frozen=True)
class _Expert:
    gate_up: Tensor
    """(D, 2P)."""
    down: Tensor
    """(P, D)."""
    gate_up_bias: Tensor | float
    down_bias: Tensor | float


def _expert(module: Any, layout: ExpertsLayout, expert: int, dtype: torch.dtype) -> _Expert:
    gate_up, down = (module.get_parameter(name)[expert].detach().to(dtype) for name in ("gate_up_proj", "down_proj"))
    if not layout.is_transposed:
        gate_up, down = gate_up.mT, down.mT
    if not layout.has_bias:
        return _Expert(gate_up, down, 0.0, 0.0)
    biases = (module.get_parameter(f"{name}_bias")[expert].detach().to(dtype) for name in ("gate_up_proj", "down_proj"))
    return _Expert(gate_up, down, *biases)


def _gated(module: Any, before: Tensor) -> Tensor:
    return module._apply_gate(before) if hasattr(module, "_apply_gate") else usual_gate(module, before)


def routed_tokens(layout: ExpertsLayout, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (T, D), experts chosen for each (T, K) and their weights (T, K), from an experts module's arguments.

    A presorted module gets each token once for each expert, already weighted: its weights are 1 here. Indices from E on
    are not of experts.
    """
    if not layout.presorted:
        return arguments[0], arguments[1], arguments[2]
    (repeated,) = arguments
    routed = repeated.any(dim=1)
    experts = torch.arange(layout.num_experts, device=repeated.device).repeat_interleave(
        len(repeated) // layout.num_experts
    )[routed, None]
    return repeated[routed], experts, torch.ones_like(experts, dtype=repeated.dtype)
