"""Invented statistics to test calibrated rivals on."""

from __future__ import annotations

import torch

from benchmarks.calibration import Calibration, LayerStatistics
from tests.random_experts import second_moment


def invented(num_experts: int, rows: int, columns: int, layers: tuple[int, ...] = (0,)) -> Calibration:
    """Random second moments, more tokens for later experts, and a saliency that differs between layers."""
    statistics = {
        layer: LayerStatistics(
            inputs=second_moment(columns, seed=layer).float(),
            inner=torch.stack([second_moment(rows, seed=layer + expert) for expert in range(num_experts)]).float(),
            counts=torch.arange(1.0, num_experts + 1),
            saliency=torch.rand(num_experts, generator=torch.Generator().manual_seed(layer)),
            output_similarity=torch.eye(num_experts),
            logit_similarity=torch.eye(num_experts),
        )
        for layer in layers
    }
    return Calibration(statistics, num_tokens=100, seconds=0.0)
