"""Routed experts run one by one, of every family with its own gate function, for what is measured of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from globe.checkpoint.gate_up import split_gate_up
from globe.model.expert_modules import ExpertMatrices, ExpertsLayout, RoutedExperts
from globe.model.experts import usual_gate

OnRun = Callable[[int, Tensor, Tensor, "ExpertRun"], None]
"""Told of each expert that is run: which, the tokens that come to it (T, D), their router weights (T,), and its run."""
OnGradient = Callable[[int, str, Tensor, Tensor, Tensor], None]
"""Told of each expert's `gate_up_proj` and `down_proj` when gradients go back through it: the expert, the name, which
tokens came to it (T,), their inputs (T, N), and the gradient (T, K) of the outputs."""


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


def run_expert(experts: RoutedExperts, expert: int, x: Tensor) -> ExpertRun:
    """Run one expert on tokens x (T, D), with its family's own gate function."""
    own = experts.matrices(expert, torch.float32)
    return _run_from(experts, own, x.detach().float() @ own.gate_up + own.gate_up_bias)


def inner_units(experts: RoutedExperts, expert: int, x: Tensor) -> Tensor:
    """h = act(gate x, up x) (T, P) of one expert on tokens x (T, D), with its family's own gate function."""
    own = experts.matrices(expert, torch.float32)
    return _gated(experts.module, x.float() @ own.gate_up + own.gate_up_bias)


def run_experts(
    experts: RoutedExperts,
    arguments: tuple[Tensor, ...],
    on_run: OnRun | None = None,
    on_gradient: OnGradient | None = None,
) -> Tensor:
    """What the forward of the experts module returns, computed expert by expert, each of which is needed for a moment,
    and in the backward pass for another."""
    layout = experts.layout
    x, chosen, weights = routed_tokens(layout, arguments)
    identity = weights.where(chosen >= layout.num_experts, 0).sum(1, keepdim=True)
    if on_gradient is not None and not x.requires_grad:
        x = x.detach().requires_grad_()
    numbers = token_numbers(layout, arguments)
    outputs: Any = _RunExperts.apply(x, weights, chosen, numbers, experts, on_run, on_gradient)
    outputs = outputs + x * identity
    if not layout.presorted:
        return outputs
    (repeated,) = arguments
    return torch.zeros_like(repeated).index_put((repeated.any(dim=1),), outputs)


@contextlib.contextmanager
def run_by(experts: RoutedExperts, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within it, the experts module computes by another forward than its own."""
    module, earlier = experts.module, vars(experts.module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if earlier is None:
            del module.forward
        else:
            module.forward = earlier


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


def token_numbers(layout: ExpertsLayout, arguments: tuple[Tensor, ...]) -> Tensor:
    """Which of all tokens those of `routed_tokens` are, (T,)."""
    if not layout.presorted:
        return torch.arange(len(arguments[0]), device=arguments[0].device)
    (repeated,) = arguments
    return torch.where(repeated.any(dim=1))[0] % (len(repeated) // layout.num_experts)


class _RunExperts(Function):
    """Σ_e p_te down_e act(gate_up_e x_t) of all tokens. Kept for the backward pass are tokens and what comes before the
    gate function, not the matrices."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        chosen: Tensor,
        numbers: Tensor,
        experts: RoutedExperts,
        on_run: OnRun | None,
        on_gradient: OnGradient | None,
    ) -> Tensor:
        outputs, befores = torch.zeros_like(x), dict[int, Tensor]()
        for expert in range(experts.layout.num_experts):
            token, place = torch.where(chosen == expert)
            if not len(token):
                continue
            own, inputs = experts.matrices(expert, x.dtype), x[token]
            before = inputs @ own.gate_up + own.gate_up_bias
            if on_run is None:
                output = _gated(experts.module, before) @ own.down + own.down_bias
            else:
                run = _run_from(experts, own, before)
                on_run(expert, inputs, weights[token, place], run)
                output = run.outputs
            if any(ctx.needs_input_grad):
                befores[expert] = before
            outputs.index_add_(0, token, output.mul_(weights[token, place, None]))
        ctx.save_for_backward(x, weights, chosen, numbers)
        ctx.rest = experts, befores, on_gradient
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x, weights, chosen, numbers), (gradient,) = ctx.saved_tensors, gradients
        experts, befores, on_gradient = ctx.rest
        of_x, of_weights = torch.zeros_like(x), torch.zeros_like(weights)
        for expert, before in befores.items():
            token, place = torch.where(chosen == expert)
            own, of_output = experts.matrices(expert, x.dtype), gradient[token]
            router_weights = weights[token, place, None]
            with torch.enable_grad():
                leaf = before.detach().requires_grad_()
                h = _gated(experts.module, leaf)
            of_h = of_output @ own.down.mT
            of_product = (of_h * h.detach()).sum(1) + (of_output * own.down_bias).sum(1)
            of_weights[token, place] = of_product.to(of_weights.dtype)
            (of_before,) = torch.autograd.grad(h, leaf, router_weights * of_h)
            of_x.index_add_(0, token, of_before @ own.gate_up.mT)
            if on_gradient is not None:
                on_gradient(expert, "gate_up_proj", numbers[token], x[token], of_before)
                on_gradient(expert, "down_proj", numbers[token], h.detach(), router_weights * of_output)
        return of_x, of_weights, None, None, None, None, None


def _run_from(experts: RoutedExperts, own: ExpertMatrices, before: Tensor) -> ExpertRun:
    """From what comes before the gate function (T, 2P)."""
    with torch.enable_grad():
        leaf = before.detach().requires_grad_()
        h = _gated(experts.module, leaf)
        (slope,) = torch.autograd.grad(h.sum(), leaf)
    by_gate, by_up = split_gate_up(slope, 1, interleaved=not experts.layout.is_concatenated)
    return ExpertRun(h.detach(), by_gate, by_up, h.detach() @ own.down + own.down_bias, own.down)


def _gated(module: Any, before: Tensor) -> Tensor:
    return module._apply_gate(before) if hasattr(module, "_apply_gate") else usual_gate(module, before)
