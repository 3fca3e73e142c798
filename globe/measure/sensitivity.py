"""How much an error in a layer's experts costs the model's output.

For noise of relative size ε in the matrices W_e of a family, to second order in ε,

    KL(p ‖ p') ≈ ε² s,    s = ½ σ² Σ_e E‖∇_{W_e} log p(y)‖² per token,    y sampled from the model itself,

σ² being the mean square of the family's weights: the trace of its block of the Fisher information. Here it is taken by
output, what noise in the weights of one output costs. One backward pass gives all blocks. Any tokens will do; random
ones need neither a text nor a tokenizer, and tell the layers apart nearly as well as a text does (docs/log.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from globe.checkpoint.gate_up import split_gate_up
from globe.checkpoint.tensor_files import save_tensors
from globe.errors import CheckpointError
from globe.machine.memory import explained_exhaustion
from globe.measure.runs import NUM_WINDOWS, WINDOW
from globe.model.expert_modules import RoutedExperts, find_experts
from globe.model.expert_run import run_by, run_experts
from globe.model.loading import OUT_OF_MEMORY, text_tokens, window_length
from globe.terms import FAMILIES, Family

Sensitivities = dict[tuple[int, Family], Tensor]
"""Of every output of every expert, (E, K), by layer and family; their sum is that of the family."""


def random_windows(model: Any, seed: int) -> Tensor:
    """Token windows (N, length) for the model, uniform over its vocabulary but for what stands for pictures."""
    tokens = torch.tensor(text_tokens(model))
    generator = torch.Generator().manual_seed(seed)
    return tokens[torch.randint(len(tokens), (NUM_WINDOWS, window_length(model, WINDOW)), generator=generator)]


def measure_sensitivities(model: Any, windows: Tensor, layers: Collection[int], seed: int = 0) -> Sensitivities:
    """The sensitivities of the routed experts of `layers` on token windows (N, length).

    The memory beside the model's is a window's activations. Raises `CheckpointError` for a model whose logits are not
    finite.
    """
    sums: Sensitivities = {}
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with contextlib.ExitStack() as stack:
        for experts in find_experts(model):
            if experts.layer in layers:
                stack.enter_context(adding_squares(experts, sums, windows.shape[1]))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(explained_exhaustion(f"measuring sensitivities on {model.device}", OUT_OF_MEMORY))
        for window in windows:
            logits = model(input_ids=window[None].to(model.device), use_cache=False).logits
            sampled_loss(logits, generator).backward()
    return by_token(sums, windows)


@contextlib.contextmanager
def adding_squares(experts: RoutedExperts, sums: Sensitivities, length: int) -> Iterator[None]:
    """Within it, every backward pass of token windows, of so many tokens each, adds the squared gradients of a layer's
    experts to `sums`, those of each window by itself.

    That of an expert's matrix for a window is Xᵀ G, with its inputs X (T, N) and the gradient G (T, K) of its outputs.
    The sums of its squares over the inputs are the diagonal of Gᵀ (X Xᵀ) G, which takes T² (N + K) operations in place
    of T N K, and no memory of the matrix's size.
    """
    layout, variances = experts.layout, _mean_squares(experts)
    E, P, D = layout.num_experts, layout.intermediate_size, layout.hidden_size
    for family in FAMILIES:
        num_outputs = D if family == "down" else P
        sums[experts.layer, family] = torch.zeros(E, num_outputs, device=experts.device, dtype=experts.dtype)

    def add(expert: int, name: str, token: Tensor, inputs: Tensor, gradient: Tensor) -> None:
        _, counts = (token // length).unique_consecutive(return_counts=True)
        pairs = zip(inputs.split(counts.tolist()), gradient.split(counts.tolist()), strict=True)
        squares = torch.stack([(X @ X.mT @ G * G).sum(0).clamp_min(0) for X, G in pairs]).sum(0)
        parts = [squares] if name == "down_proj" else split_gate_up(squares, 0, interleaved=not layout.is_concatenated)
        for family, part in zip(("down",) if name == "down_proj" else ("gate", "up"), parts, strict=True):
            sums[experts.layer, family][expert] += variances[family] * part

    with run_by(experts, lambda *arguments: run_experts(experts, arguments, on_gradient=add)):
        yield


def sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """−log p(y) of a window's logits (1, length, vocabulary), summed over tokens y drawn from the model itself.

    Raises `CheckpointError` for logits that are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise CheckpointError(
            "the model computes NaN or infinite values in float32, so what errors cost it cannot be measured: "
            "mend its weights, or compress them alone with --calibrate none --allocation uniform"
        )
    log_p = logits[0, :-1].log_softmax(-1)
    sampled = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
    return -log_p.gather(1, sampled).sum()


def by_token(sums: Sensitivities, windows: Tensor) -> Sensitivities:
    """Sensitivities from the sums that `adding_squares` made on token windows (N, length)."""
    num_tokens = windows.shape[0] * (windows.shape[1] - 1)
    return {key: total.cpu() / (2 * num_tokens) for key, total in sums.items()}


@torch.no_grad()
def _mean_squares(experts: RoutedExperts) -> dict[Family, Tensor]:
    """Of the weights of each family."""
    layout, found = experts.layout, list[Tensor]()
    for expert in range(layout.num_experts):
        own = experts.matrices(expert, experts.dtype)
        parts = *split_gate_up(own.gate_up, 1, interleaved=not layout.is_concatenated), own.down
        found.append(torch.stack([part.square().mean() for part in parts]))
    return dict(zip(FAMILIES, torch.stack(found).mean(0), strict=True))


def save_sensitivities(path: Path, sensitivities: Sensitivities) -> str:
    """Write them to a safetensors file; returns its SHA-256. Raises `OutputError` when the disk is full."""
    return save_tensors(path, {f"{layer}.{family}": each for (layer, family), each in sensitivities.items()})


def load_sensitivities(path: Path) -> Sensitivities:
    """Read what `save_sensitivities` wrote, layer after layer."""
    tensors = load_file(path)
    layers = sorted({int(name.partition(".")[0]) for name in tensors})
    return {
        (layer, family): tensors[name]
        for layer in layers
        for family in FAMILIES
        if (name := f"{layer}.{family}") in tensors
    }
