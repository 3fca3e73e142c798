from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from globe.errors import CheckpointError
from globe.experts.metric import LayerStatistics, input_metric, row_scales
from globe.experts.stack import read_stack
from globe.terms import FAMILIES, Family
from tests.experts.conftest import Source, open_source, plan
from tests.model.compressed import D, E, P

BANKS: list[tuple[tuple[int, ...], tuple[Family, ...]]] = [
    ((0, 1, 2), FAMILIES),
    ((1,), ("up",)),
    ((0, 2), ("gate", "down")),
    ((2,), ("down",)),
]


def root_mean_square(source: Source, layer: int, family: Family) -> float:
    squares = [float(x) ** 2 for e in range(E) for x in source.matrix(layer, family, e).flatten()]
    return math.sqrt(sum(squares) / len(squares))


@pytest.mark.parametrize(("layers", "families"), BANKS)
def test_a_stack_is_what_a_loop_over_the_files_reads(
    source: Source, layers: tuple[int, ...], families: tuple[Family, ...]
) -> None:
    """Layer after layer, family after family, each divided by its root mean square."""
    stack = read_stack(source.checkpoint, source.layers, plan(layers, families))
    assert stack.metric is None
    assert stack.weights.dtype == torch.float32
    assert stack.weights.shape == (len(layers) * len(families) * E, P, D)
    place = 0
    groups = iter(stack.groups)
    for layer in layers:
        for family in families:
            group = next(groups)
            assert (group.layer, group.family, group.part) == (layer, family, slice(place, place + E))
            assert group.row_scales is None
            sigma = root_mean_square(source, layer, family)
            assert group.sigma == pytest.approx(sigma, rel=1e-12)
            for expert in range(E):
                expected = (source.matrix(layer, family, expert) / sigma).float()
                torch.testing.assert_close(stack.weights[place + expert], expected)
            place += E
    assert next(groups, None) is None


def test_a_calibrated_stack_has_its_rows_scaled_and_the_second_moments_of_its_layers(
    source: Source, statistics: Mapping[int, LayerStatistics]
) -> None:
    """Expert by expert: √s for the rows; C of its own layer for gate and up, the identity for down."""
    bank = plan((0, 2), ("gate", "down"))
    stack = read_stack(source.checkpoint, source.layers, bank, statistics)
    assert stack.metric is not None
    for group in stack.groups:
        sigmas = {family: root_mean_square(source, group.layer, family) for family in bank.families}
        scales = row_scales(statistics[group.layer], sigmas)[group.family]
        metric = torch.eye(D) if group.family == "down" else input_metric(statistics[group.layer])
        for expert in range(E):
            matrix, place = source.matrix(group.layer, group.family, expert), group.part.start + expert
            expected = torch.stack([scales[expert, p] * matrix[p] / sigmas[group.family] for p in range(P)])
            torch.testing.assert_close(stack.weights[place], expected.float())
            x = torch.ones(1, 1, D).cumsum(2)
            torch.testing.assert_close(stack.metric.weigh(x, slice(place, place + 1)), x @ metric.float())


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_group_restores_the_weights_of_any_part_of_it(
    source: Source, statistics: Mapping[int, LayerStatistics], calibrated: bool
) -> None:
    stack = read_stack(source.checkpoint, source.layers, plan(), statistics if calibrated else None)
    for group in stack.groups:
        part = slice(2, 5)
        expected = torch.stack([source.matrix(group.layer, group.family, e) for e in range(E)[part]]).float()
        torch.testing.assert_close(group.restore(stack.weights[group.part][part], part), expected)


def changed(source: Source, folder: Path, layer: int, family: Family, factor: float) -> Source:
    """A copy of a checkpoint in separate experts, one family of one layer multiplied."""
    ours = f"model.layers.{layer}.mlp.experts."
    tensors = {
        name: tensor * factor if name.startswith(ours) and f"{family}_proj" in name else tensor.clone()
        for name, tensor in source.tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    return open_source(folder)


@pytest.mark.parametrize("source", ["per_expert"], indirect=True)
class TestOddWeights:
    @pytest.mark.parametrize("factor", [1e-30, 1e30])
    def test_squares_may_leave_the_range_of_float32(self, source: Source, tmp_path: Path, factor: float) -> None:
        odd = changed(source, tmp_path, 1, "up", factor)
        plain = read_stack(source.checkpoint, source.layers, plan((1,), ("up",)))
        stack = read_stack(odd.checkpoint, odd.layers, plan((1,), ("up",)))
        assert stack.groups[0].sigma == pytest.approx(factor * plain.groups[0].sigma, rel=1e-6)
        torch.testing.assert_close(stack.weights, plain.weights)

    def test_zeros_are_left_alone_and_come_back(self, source: Source, tmp_path: Path) -> None:
        odd = changed(source, tmp_path, 0, "gate", 0.0)
        stack = read_stack(odd.checkpoint, odd.layers, plan((0,)))
        gate, up, _ = stack.groups
        assert gate.sigma == 0
        assert not stack.weights[gate.part].any()
        assert not gate.restore(stack.weights[gate.part], slice(0, E)).any()
        assert up.sigma > 0

    def test_what_is_not_finite_is_named(self, source: Source, tmp_path: Path) -> None:
        odd = changed(source, tmp_path, 2, "down", math.inf)
        with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.0\.down_proj\.weight holds"):
            read_stack(odd.checkpoint, odd.layers, plan((1, 2), ("down",)))
