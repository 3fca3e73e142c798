"""A tiny checkpoint in both layouts, read once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from globe.bank_shape import BankShape
from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.experts.metric import LayerStatistics
from globe.model.configuration import expert_layers
from globe.plan.scopes import BankPlan
from globe.terms import FAMILIES, Family
from tests.model.compressed import LAYERS, D, E, P
from tests.random_experts import normal, second_moment
from tests.tiny_sources import write_source


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint and its tensors as the files hold them."""

    folder: Path
    checkpoint: Checkpoint
    layers: Mapping[int, ExpertLayer]
    tensors: Mapping[str, Tensor]

    def matrix(self, layer: int, family: Family, expert: int) -> Tensor:
        """One expert's matrix, (P, D), in float64, by the names and orders of transformers."""
        prefix = f"model.layers.{layer}.mlp.experts."
        if (name := f"{prefix}{expert}.{family}_proj.weight") in self.tensors:
            matrix = self.tensors[name]
            return (matrix.T if family == "down" else matrix).double()
        if family == "down":
            return self.tensors[f"{prefix}down_proj"][expert].T.double()
        rows = slice(0, P) if family == "gate" else slice(P, 2 * P)
        return self.tensors[f"{prefix}gate_up_proj"][expert, rows].double()


def open_source(folder: Path) -> Source:
    checkpoint = open_checkpoint(folder)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return Source(folder, checkpoint, {layer.index: layer for layer in expert_layers(checkpoint)}, tensors)


@pytest.fixture(scope="session", params=["per_expert", "fused"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp(request.param)
    write_source(folder, layout=request.param)
    return open_source(folder)


def plan(layers: tuple[int, ...] = (0, 1, 2), families: tuple[Family, ...] = FAMILIES) -> BankPlan:
    """A bank of the tiny checkpoint."""
    return BankPlan(layers, families, BankShape(len(layers) * len(families) * E, P, D, rank=5, num_bases=4))


@pytest.fixture(scope="session")
def statistics() -> Mapping[int, LayerStatistics]:
    """Of three layers with a second moment each, and experts of which some matter more than others."""
    counts = torch.tensor([30.0, 5, 0, 65, 120, 20])
    return {
        layer: LayerStatistics(
            num_tokens=120,
            inputs=second_moment(D, seed=layer).float(),
            counts=counts.roll(layer),
            rows={
                family: counts.roll(layer)[:, None] * scale * normal(E, P, seed=10 * layer + scale).float().square()
                for family, scale in (("gate", 1), ("up", 2), ("down", 3))
            },
        )
        for layer in range(LAYERS)
    }
