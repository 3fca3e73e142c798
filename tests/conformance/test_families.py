"""Compress, load, evaluate and export, for every family in every layout that occurs on disk."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from globe import CompressConfig, compress
from globe.checkpoint.layout import ExpertLayer, source_names
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.checkpoint.report import Report
from globe.model import RoutedExperts, find_experts
from globe.model.experts import _globe_class
from globe.model.loading import expert_layers
from globe.model.names import is_factor
from globe.run.export import export_dense
from globe.terms import FAMILIES
from tests.conformance.families import COMPOSITES, D, E, P
from tests.conformance.tiny import CASES, Case, load, logits, write
from tests.rounding import assert_equal_but_for_rounding

EXACT = CompressConfig(rank_ratio=1, basis_ratio=1, activation="identity", steps=5, calibrate="none")
LOSSY = CompressConfig(keep=0.7, steps=3)


@dataclasses.dataclass(frozen=True)
class Built:
    """A case's checkpoint, what GloBE makes of it, and the models loaded from both."""

    case: Case
    source: Checkpoint
    layers: list[ExpertLayer]
    model: PreTrainedModel
    exact: PreTrainedModel
    lossy: PreTrainedModel
    compressed: Checkpoint
    report: Report
    dense: Checkpoint

    @property
    def expert_tensors(self) -> set[str]:
        """Names of the source's tensors that hold routed experts."""
        return {name for layer in self.layers for family in FAMILIES for name in source_names(layer, family)}


@pytest.fixture(scope="module", params=CASES, ids=str)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    case: Case = request.param
    folder: Path = tmp_path_factory.mktemp(str(case))
    model = write(case, folder / "source")
    compress(folder / "source", folder / "exact", EXACT)
    report = compress(folder / "source", folder / "lossy", LOSSY)
    export_dense(folder / "lossy", folder / "dense")
    source = open_checkpoint(folder / "source")
    return Built(
        case,
        source,
        expert_layers(source),
        model,
        load(folder / "exact", case.family),
        load(folder / "lossy", case.family),
        open_checkpoint(folder / "lossy"),
        report,
        open_checkpoint(folder / "dense"),
    )


def test_the_experts_on_disk_are_those_of_the_model(built: Built) -> None:
    experts = {found.layer: found for found in find_experts(built.model)}
    assert [layer.index for layer in built.layers] == list(experts)
    assert len(built.layers) >= 2
    for layer in built.layers:
        assert (layer.num_experts, layer.intermediate_size, layer.hidden_size) == (E, P, D)
        if layer.layout == "fused":
            assert layer.transposed == experts[layer.index].layout.is_transposed
            assert layer.interleaved == (not experts[layer.index].layout.is_concatenated)


@torch.no_grad()
def test_each_expert_computes_what_it_does_in_transformers(built: Built) -> None:
    states = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    for original in find_experts(built.model):
        factorised = built.exact.get_submodule(original.path)
        assert type(factorised).__name__ == f"Globe{type(original.module).__name__}"
        outputs = [one_expert(original, original.module, expert, states) for expert in range(E)]
        for expert in range(E):
            ours = one_expert(original, factorised, expert, states)
            torch.testing.assert_close(ours, outputs[expert], rtol=0, atol=1e-5)
            assert (ours - outputs[expert - 1]).abs().max() > 1e-2  # the experts differ by far more than the tolerance


def one_expert(experts: RoutedExperts, module: torch.nn.Module, expert: int, states: Tensor) -> Tensor:
    """What one expert makes of the states, by the experts' own forward."""
    if experts.layout.presorted:
        handed = states.new_zeros(E, *states.shape)
        handed[expert] = states
        return module(handed.flatten(0, 1)).view_as(handed)[expert]
    index = torch.tensor([[expert, (expert + 1) % E]]).expand(len(states), 2)
    return module(states, index, torch.tensor([[1.0, 0.0]]).expand(len(states), 2))


def test_identity_experts_return_their_input(built: Built) -> None:
    states, index = torch.randn(3, D), torch.tensor([[E], [0], [E + 1]])
    for original in find_experts(built.model):
        if original.layout.num_identity:
            output = built.exact.get_submodule(original.path)(states, index, torch.full((3, 1), 0.5))
            torch.testing.assert_close(output[[0, 2]], 0.5 * states[[0, 2]])


def test_nothing_compressed_away_leaves_the_logits(built: Built) -> None:
    torch.testing.assert_close(logits(built.exact), logits(built.model), rtol=0, atol=1e-5)


def test_a_pickle_of_it_is_the_same_model(built: Built) -> None:
    pickled = pickle.dumps(built.lossy)
    _globe_class.cache_clear()  # the classes are made anew, as they are in another process
    twin = pickle.loads(pickled)
    tensors = built.lossy.state_dict()
    assert twin.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in twin.state_dict().items())
    assert_equal_but_for_rounding(logits(twin), logits(built.lossy))


def test_a_lossy_model_has_the_logits_of_its_dense_export(built: Built) -> None:
    ours = logits(built.lossy)
    torch.testing.assert_close(ours, logits(load(built.dense.folder, built.case.family)), rtol=0, atol=1e-5)
    assert (ours - logits(built.model)).abs().max() > 1e-2  # or the comparison would say nothing


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("family", COMPOSITES)
def test_the_language_model_of_a_composite_loads_alone(tmp_path: Path, family: str, scope: str) -> None:
    write(Case(family, "saved"), tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "out", CompressConfig(keep=0.7, steps=2, scope=scope))
    whole, alone = load(tmp_path / "out", family), load(tmp_path / "out")
    assert type(whole) is not type(alone)
    torch.testing.assert_close(logits(alone), logits(whole), rtol=0, atol=1e-5)


def test_the_dense_export_is_laid_out_as_the_source(built: Built) -> None:
    assert built.dense.config == built.source.config
    assert built.dense.shards == built.source.shards
    assert len(built.source.shards) > 1 or built.case.layout == "fused"
    for shard in built.source.shards:
        assert described(built.dense, shard) == described(built.source, shard)


def described(checkpoint: Checkpoint, shard: str) -> set[tuple[str, str, tuple[int, ...]]]:
    return {(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.shard_tensors(shard)}


def test_all_but_the_experts_is_untouched(built: Built) -> None:
    others = built.source.tensors.keys() - built.expert_tensors
    assert others
    for name in others:
        tensor = built.source.read(name)
        assert torch.equal(built.compressed.read(name), tensor), name
        assert torch.equal(built.dense.read(name), tensor), name
    assert built.expert_tensors.isdisjoint(built.compressed.tensors.keys() - {tripwire(built)})


def test_memory_holds_the_factors_and_no_dense_experts(built: Built) -> None:
    stored = {name: tensor for name, tensor in built.compressed.tensors.items() if name != tripwire(built)}
    in_memory = sum(tensor.nbytes for tensor in built.lossy.state_dict().values())
    assert in_memory == sum(tensor.nbytes for tensor in stored.values())
    factors = sum(tensor.nbytes for name, tensor in stored.items() if is_factor(name))
    original = sum(3 * layer.num_experts * P * D * 4 for layer in built.layers)
    assert 0.5 * original < factors <= 0.7 * original
    assert factors == round(built.report.kept * original)


def tripwire(built: Built) -> str:
    (name,) = (name for name, tensor in built.compressed.tensors.items() if tensor.shape == (1, 1, 1))
    return name
