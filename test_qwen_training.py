#!/usr/bin/env python
"""Watch alternating minimisation fit a bank to the experts of a mixture of experts.

    python test_qwen_training.py --use-single-layer --layer-idx 12 --steps 20 --rank-ratio 0.75 --basis-ratio 0.5
    python test_qwen_training.py --steps 20 --rank-ratio 0.75 --basis-ratio 0.5 --max-experts 128

Prints λ, β, temperature, support and error of every step and draws the trajectory.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import tyro
from rich.console import Console
from torch import Tensor

from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.checkpoint.stacks import read_family
from globe.errors import GlobeError, SettingsError
from globe.model.configuration import expert_layers
from globe.report.trajectory import draw_trajectory
from globe.terms import Activation, CodeMap, Family, Solver, WarmStartName
from globe.train.config import FitConfig
from globe.train.fit_banks import fit_bank
from globe.train.result import MEANING, FitResult, StepRecord


@dataclasses.dataclass(frozen=True)
class Training:
    """Fit one bank to one family of experts."""

    model: str = "shipped"
    """Local folder or Hub id; `shipped` is the model that comes with GloBE."""
    family: Family = "up"
    """Expert matrices to fit."""
    use_single_layer: bool = False
    """Take the experts of one layer, instead of all layers'."""
    layer_idx: int = 12
    """The layer, with --use-single-layer."""
    max_experts: int | None = None
    """Take the first so many experts at most."""
    rank_ratio: float = 0.75
    """R / P."""
    basis_ratio: float = 0.5
    """M / E."""
    steps: int = 20
    """Steps of the fit."""
    solver: Solver = "am"
    """Solver; am has the homotopy λ and the blending β."""
    activation: Activation = "silu"
    """φ."""
    codes: CodeMap = "ridge"
    """Codes."""
    support: int | None = None
    """Bases each expert mixes; None: all."""
    warm_start: WarmStartName = "procrustes"
    """Where the fit begins."""
    seed: int = 0
    """Seed of the warm start."""
    device: str = "cpu"
    """Where the fit runs."""
    picture: Path = Path("trajectory.png")
    """Picture of the trajectory."""


def extract_single_layer_experts(model: str, layer_idx: int = 12, family: Family = "up") -> Tensor:
    """The experts of one layer, (E, P, D) in float32. Raises `SettingsError` if the layer has none."""
    checkpoint = open_checkpoint(resolve_model(model))
    layers = {layer.index: layer for layer in expert_layers(checkpoint)}
    if layer_idx not in layers:
        raise SettingsError(f"layer {layer_idx} holds no routed experts; those that do are {sorted(layers)}")
    return read_family(checkpoint, layers[layer_idx], family).float()


def extract_experts(model: str, family: Family = "up", max_experts: int | None = None) -> Tensor:
    """The experts of all layers, layer after layer, the first `max_experts` of them; (E, P, D) in float32."""
    checkpoint = open_checkpoint(resolve_model(model))
    stacks: list[Tensor] = []
    for layer in expert_layers(checkpoint):
        stacks.append(read_family(checkpoint, layer, family).float())
        if max_experts is not None and sum(map(len, stacks)) >= max_experts:
            break
    return torch.cat(stacks)[:max_experts]


def train(settings: Training, console: Console) -> FitResult:
    if settings.use_single_layer:
        experts = extract_single_layer_experts(settings.model, settings.layer_idx, settings.family)[
            : settings.max_experts
        ]
    else:
        experts = extract_experts(settings.model, settings.family, settings.max_experts)
    num_experts, rows, columns = experts.shape
    config = FitConfig(
        rank=max(1, round(settings.rank_ratio * rows)),
        num_bases=max(1, round(settings.basis_ratio * num_experts)),
        activation=settings.activation,
        codes=settings.codes,
        support=settings.support,
        solver=settings.solver,
        warm_start=settings.warm_start,
        max_steps=settings.steps,
        seed=settings.seed,
        device=settings.device,
    )
    console.print(
        f"{num_experts} {settings.family} experts of {rows} x {columns}: rank {config.rank}, {config.num_bases} bases, "
        f"{config.activation}, {config.codes} codes, {config.solver} from {config.warm_start}"
    )
    console.print("step  lambda  beta  temperature  support  entropy  step size   error of step  best error")

    def show(record: StepRecord) -> None:
        console.print(
            f"{record.step:4d}  {record.activation_lambda:6.3f}  {record.route_beta:4.2f}  {record.temperature:11.3f}  "
            f"{record.median_support:7.1f}  {record.mean_entropy:7.3f}  {record.step_size:9.3f}  "
            f"{record.raw_error:14.5f}  {record.error:10.5f}"
        )

    result = fit_bank(experts, config, show)
    kept = result.factors.num_parameters / experts.numel()
    console.print(
        f"{result.outcome}: {MEANING[result.outcome]}; relative error {result.history[-1]:.5f}, kept {kept:.4f}"
    )
    draw_trajectory(result, settings.picture)
    console.print(f"trajectory in {settings.picture}")
    return result


def main(settings: Training) -> int:
    try:
        train(settings, Console(highlight=False, soft_wrap=True))
    except GlobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Training)))
