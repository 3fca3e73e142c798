"""Compress, load, evaluate and export, for every family in every layout that occurs on disk."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from globe import CompressConfig, compress
from globe.checkpoint.layout import ExpertLayer, source_names, stated_model
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.checkpoint.report import Report
from globe.model.configuration import expert_layers, language_model
from globe.model.expert_modules import RoutedExperts, find_experts
from globe.model.experts import GlobeExperts, _globe_class
from globe.model.names import is_factor
from globe.run.export import export_dense
from globe.terms import FAMILIES
from tests.conformance.families import COMPOSITES, D, E, P
from tests.conformance.tiny import CASES, Case, load, logits, write
from tests.rounding import assert_equal_but_for_rounding

EXACT = CompressConfig(rank_ratio=1, basis_ratio=1, activation="identity", steps=5, calibrate="none")
LOSSY = CompressConfig(keep=0.7, steps=3, calibrate="none", allocation="uniform")  # CODED measures
CODED = CompressConfig(bits=4)


@dataclasses.dataclass(frozen=True)
class Compressed:
    """One compression of a source: what was told of it, its checkpoint, its dense export, and the loaded model."""

    report: Report
    checkpoint: Checkpoint
    dense: Checkpoint
    model: PreTrainedModel

    @classmethod
    def make(cls, case: Case, folder: Path, name: str, config: CompressConfig) -> Compressed:
        report = compress(folder / "source", folder / name, config)
        dense = export_dense(folder / name, folder / f"{name} dense")
        return cls(report, open_checkpoint(folder / name), open_checkpoint(dense), load(folder / name, case.family))


@dataclasses.dataclass(frozen=True)
class Built:
    """A case's checkpoint, what GloBE makes of it, and the models loaded from both."""

    case: Case
    source: Checkpoint
    layers: list[ExpertLayer]
    model: PreTrainedModel
    exact: PreTrainedModel
    lossy: Compressed
    coded: Compressed

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
    source = open_checkpoint(folder / "source")
    return Built(
        case,
        source,
        expert_layers(source),
        model,
        load(folder / "exact", case.family),
        Compressed.make(case, folder, "lossy", LOSSY),
        Compressed.make(case, folder, "coded", CODED),
    )


KINDS = pytest.mark.parametrize("kind", ["lossy", "coded"])


def test_the_experts_on_disk_are_those_of_the_model(built: Built) -> None:
    experts = {found.layer: found for found in find_experts(built.model)}
    assert [layer.index for layer in built.layers] == list(experts)
    assert len(built.layers) >= 2
    for layer in built.layers:
        assert (layer.num_experts, layer.intermediate_size, layer.hidden_size) == (E, P, D)
        if layer.layout == "fused":
            assert layer.transposed == experts[layer.index].layout.is_transposed
            assert layer.interleaved == (not experts[layer.index].layout.is_concatenated)


def test_config_json_itself_says_what_transformers_reads(built: Built) -> None:
    leaves_it_to_transformers = built.case.family == "longcat_flash"  # whose layers count twice
    assert stated_model(built.source.config) == (None if leaves_it_to_transformers else language_model(built.source))


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


@KINDS
def test_a_pickle_of_it_is_the_same_model(built: Built, kind: str) -> None:
    model: PreTrainedModel = getattr(built, kind).model
    pickled = pickle.dumps(model)
    _globe_class.cache_clear()  # the classes are made anew, as they are in another process
    twin = pickle.loads(pickled)
    assert_same_tensors(twin, model)
    assert_equal_but_for_rounding(logits(twin), logits(model))


def assert_same_tensors(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    tensors = expected.state_dict()
    assert found.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.state_dict().items())


def test_a_coded_model_saved_again_is_the_same_model(built: Built, tmp_path: Path) -> None:
    built.coded.model.save_pretrained(tmp_path)
    assert_same_tensors(load(tmp_path, built.case.family), built.coded.model)


@KINDS
def test_a_lossy_model_has_the_logits_of_its_dense_export(built: Built, kind: str) -> None:
    made: Compressed = getattr(built, kind)
    ours = logits(made.model)
    torch.testing.assert_close(ours, logits(load(made.dense.folder, built.case.family)), rtol=0, atol=1e-5)
    least = {"lossy": 1e-2, "coded": 1e-4}[kind]
    assert (ours - logits(built.model)).abs().max() > least  # or the comparison would say nothing


@torch.no_grad()
def test_each_coded_expert_is_that_of_the_dense_export_bit_for_bit(built: Built) -> None:
    for expected in find_experts(load(built.coded.dense.folder, built.case.family)):
        module = cast(GlobeExperts, built.coded.model.get_submodule(expected.path))
        gate_up, down = module.globe_matrices(dict(module.named_parameters(recurse=False)), range(E), torch.empty(0))
        transposed = expected.layout.is_transposed
        assert torch.equal(gate_up.mT if transposed else gate_up, expected.module.gate_up_proj[:E])
        assert torch.equal(down if transposed else down.mT, expected.module.down_proj[:E])


def test_four_bits_are_spent_and_measured(built: Built) -> None:
    report = built.coded.report
    assert report.bits is not None
    assert 3.95 < report.bits <= 4
    assert 0 < report.error < 0.3
    assert (report.uncalibrated_because, report.uniform_because) == (None, None)
    assert [(part.layer, part.family) for part in report.coded] == [
        (layer.index, family) for layer in built.layers for family in FAMILIES
    ]
    is_mended = built.case.family != "deepseek_v4"  # whose layers hand on several streams, mixed
    assert report.uncompensated_because is None
    assert all((part.compensated is not None) == (is_mended and part.family == "down") for part in report.coded)


@pytest.mark.parametrize(
    "config",
    [
        CompressConfig(keep=0.7, steps=2),
        CompressConfig(keep=0.7, steps=2, scope="model"),
        CompressConfig(bits=3, calibrate="none", allocation="uniform"),
    ],
    ids=["layer", "model", "coded"],
)
@pytest.mark.parametrize("family", COMPOSITES)
def test_the_language_model_of_a_composite_loads_alone(tmp_path: Path, family: str, config: CompressConfig) -> None:
    write(Case(family, "saved"), tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "out", config)
    whole, alone = load(tmp_path / "out", family), load(tmp_path / "out")
    assert type(whole) is not type(alone)
    torch.testing.assert_close(logits(alone), logits(whole), rtol=0, atol=1e-5)


@KINDS
def test_the_dense_export_is_laid_out_as_the_source(built: Built, kind: str) -> None:
    dense: Checkpoint = getattr(built, kind).dense
    assert {key: value for key, value in dense.config.items() if key != "globe_export"} == built.source.config
    assert dense.shards == built.source.shards
    assert len(built.source.shards) > 1 or built.case.layout == "fused"
    for shard in built.source.shards:
        assert described(dense, shard) == described(built.source, shard)


def described(checkpoint: Checkpoint, shard: str) -> set[tuple[str, str, tuple[int, ...]]]:
    return {(tensor.name, tensor.dtype, tensor.shape) for tensor in checkpoint.shard_tensors(shard)}


@KINDS
def test_all_but_the_experts_is_untouched(built: Built, kind: str) -> None:
    made: Compressed = getattr(built, kind)
    others = built.source.tensors.keys() - built.expert_tensors
    assert others
    for name in others:
        tensor = built.source.read(name)
        assert torch.equal(made.checkpoint.read(name), tensor), name
        assert torch.equal(made.dense.read(name), tensor), name
    assert built.expert_tensors.isdisjoint(made.checkpoint.tensors.keys() - {tripwire(made)})


@KINDS
def test_memory_holds_what_is_stored_and_no_dense_experts(built: Built, kind: str) -> None:
    made: Compressed = getattr(built, kind)
    stored = {name: tensor for name, tensor in made.checkpoint.tensors.items() if name != tripwire(made)}
    in_memory = sum(tensor.nbytes for tensor in made.model.state_dict().values())
    assert in_memory == sum(tensor.nbytes for tensor in stored.values())
    experts = sum(tensor.nbytes for name, tensor in stored.items() if is_factor(name))
    weights = sum(3 * layer.num_experts * P * D for layer in built.layers)
    if kind == "coded":
        assert made.report.bits == 8 * experts / weights
    else:
        assert 0.5 * 4 * weights < experts <= 0.7 * 4 * weights
        assert experts == round(made.report.kept * 4 * weights)


def tripwire(made: Compressed) -> str:
    (name,) = (name for name, tensor in made.checkpoint.tensors.items() if tensor.shape == (1, 1, 1))
    return name
