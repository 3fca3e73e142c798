"""Coded experts inside transformers: packed in memory, decoded when they are hit."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
)
from transformers.trainer_utils import validate_quantization_for_training

from globe import CheckpointError, UnsupportedModelError, compress, export_dense, set_compose_cache
from globe.checkpoint.reader import open_checkpoint
from globe.model.expert_modules import find_experts
from globe.model.experts import GlobeExperts, _globe_class
from globe.model.names import is_factor
from tests.coded import ALONE, LAYERS, E, bytes_of_experts, write_source
from tests.fresh_process import FreshProcess
from tests.model.compressed import logits, token_ids
from tests.model.test_without_globe import LOAD
from tests.rounding import assert_equal_but_for_rounding

X = "model.layers.1.mlp.experts"
DTYPES = [torch.float32, torch.bfloat16]
"""Of the source, and of what is loaded."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a source, `coded` and its `dense` export, once for each dtype; only to be read."""
    folders: dict[torch.dtype, Path] = {}

    def make(dtype: torch.dtype = torch.float32) -> Path:
        if dtype not in folders:
            folders[dtype] = folder = tmp_path_factory.mktemp("coded")
            write_source(folder / "source", dtype)
            compress(folder / "source", folder / "coded", ALONE)
            export_dense(folder / "coded", folder / "dense")
        return folders[dtype]

    return make


@pytest.fixture
def folder(made: Callable[..., Path]) -> Path:
    return made() / "coded"


def load(path: Path, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, **settings).eval()


def globe_modules(model: PreTrainedModel) -> list[GlobeExperts]:
    return [module for module in model.modules() if isinstance(module, GlobeExperts)]


def assert_same_tensors(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    tensors = expected.state_dict()
    assert found.state_dict().keys() == tensors.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == tensors[name].dtype, name
        assert torch.equal(tensor, tensors[name]), name


# packed, and the same model as its dense export


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_holds_what_is_stored(made: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = made(dtype)
    model = load(folder / "coded", dtype=dtype)
    assert model.dtype == dtype
    assert len(globe_modules(model)) == LAYERS
    held = {name: parameter for name, parameter in model.named_parameters() if is_factor(name)}
    assert sum(parameter.nbytes for parameter in held.values()) == bytes_of_experts(folder / "coded")
    assert {parameter.dtype for parameter in held.values()} <= {torch.uint8, torch.int8, torch.int16}
    assert not any(parameter.requires_grad for parameter in held.values())
    assert not [name for name in model.state_dict() if ".experts." in name and name not in held]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_its_dense_export(made: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = made(dtype)
    model, dense = (load(folder / name, dtype=dtype) for name in ("coded", "dense"))
    for module, expected in zip(globe_modules(model), find_experts(dense), strict=True):
        parameters = dict(module.named_parameters(recurse=False))
        gate_up, down = module.globe_matrices(parameters, range(E), torch.empty(0, dtype=dtype))
        assert torch.equal(gate_up, expected.module.gate_up_proj)
        assert torch.equal(down.mT, expected.module.down_proj)
    assert_equal_but_for_rounding(logits(model), logits(dense), units=20)  # packed, products are summed otherwise
    assert (logits(model) - logits(load(folder / "source", dtype=dtype))).abs().max() > 0.01


def test_some_experts_decode_as_all_do(folder: Path) -> None:
    module = globe_modules(load(folder))[0]
    parameters, like = dict(module.named_parameters(recurse=False)), torch.empty(0)
    every = module.globe_matrices(parameters, range(E), like)
    some = module.globe_matrices(parameters, [5, 0, 3], like)
    for all_of_them, found in zip(every, some, strict=True):
        assert torch.equal(found, all_of_them[[5, 0, 3]])


def test_a_half_precision_model_is_the_single_one_rounded(folder: Path) -> None:
    half, single = load(folder, dtype=torch.bfloat16), load(folder)
    assert all(parameter.dtype != torch.bfloat16 for name, parameter in half.named_parameters() if is_factor(name))
    assert float((logits(half).float() - logits(single)).norm() / logits(single).norm()) < 0.05
    assert_same_factors(half, single)
    assert_same_factors(single.to(torch.bfloat16), half)


def assert_same_factors(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    for (name, ours), (_, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert not is_factor(name) or torch.equal(ours, theirs), name


def test_generate(made: Callable[..., Path]) -> None:
    settings = {"max_new_tokens": 6, "do_sample": False}
    ours, dense = (load(made() / name).generate(token_ids(), **settings) for name in ("coded", "dense"))
    assert torch.equal(ours, dense)


def test_continuous_batching(folder: Path) -> None:
    """Four prompts of several lengths, with room in a batch for some of them and a part of the next."""
    model, prompts = load(folder), [list(range(3, 3 + length)) for length in (4, 9, 1, 6)]
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=12)
    found = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=small)
    alone = [model.generate(torch.tensor([prompt]), generation_config=greedy)[0, len(prompt) :] for prompt in prompts]
    assert [output.generated_tokens for output in found.values()] == [ids.tolist() for ids in alone]


def test_loading_reports_nothing_amiss(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(folder)
    assert caplog.text == ""


def test_no_expert_is_decoded_to_be_multiplied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    expected = logits(model)
    monkeypatch.setattr(GlobeExperts, "_globe_compose", None)
    assert torch.equal(logits(model), expected)


@torch.no_grad()
def test_indices_of_other_devices_and_of_servers(folder: Path) -> None:
    module = globe_modules(load(folder))[0]
    states, index = torch.randn(3, module.globe_layout.hidden_size), torch.tensor([[1, E], [E, E + 1], [2, 1]])
    weights = torch.rand(3, 2)
    expected = module(states, index.where(index < E, 0), weights.where(index < E, 0))
    torch.testing.assert_close(module(states, index, weights), expected)
    assert torch.equal(module(states, index.int(), weights), module(states, index, weights))  # as vLLM has them


@pytest.mark.parametrize("wants_gradients", [False, True])
def test_it_compiles_without_a_break(folder: Path, wants_gradients: bool) -> None:
    module = globe_modules(load(folder))[0]
    states = torch.randn(5, module.globe_layout.hidden_size, requires_grad=wants_gradients)
    index, weights = torch.tensor([[0, 1], [7, 0], [2, 3], [E, 5], [0, 2]]), torch.rand(5, 2)
    compiled = torch.compile(module.forward, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(wants_gradients):
        found, expected = compiled(states, index, weights), module(states, index, weights)
    torch.testing.assert_close(found, expected)
    if wants_gradients:
        torch.testing.assert_close(*(torch.autograd.grad(output.sum(), states)[0] for output in (found, expected)))


# saved, copied, moved


def test_saving_and_loading_again_changes_no_bit(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_tensors(again, model)
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    saved = {n: t for path in (tmp_path).glob("*.safetensors") for n, t in load_file(path).items()}
    assert saved.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in saved.items())
    sections = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, tmp_path)]
    assert sections[0] == sections[1]


def test_saves_in_shards(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert_same_tensors(load(tmp_path), model)


def test_loads_from_a_state_dict(folder: Path) -> None:
    model, config = load(folder), AutoConfig.from_pretrained(folder)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    found = Qwen3MoeForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
    assert_same_tensors(found, model)
    del tensors[f"{X}.globe_up_payload"]
    with pytest.raises(CheckpointError, match=rf"lacks {X}.globe_up_payload: the state dict is incomplete"):
        Qwen3MoeForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


def test_copies_and_pickles_are_independent(folder: Path) -> None:
    model = load(folder)
    before, pickled = logits(model), pickle.dumps(model)
    _globe_class.cache_clear()  # the classes are made anew, as they are in another process
    for twin in (copy.deepcopy(model), pickle.loads(pickled)):
        assert_same_tensors(twin, model)
        assert_equal_but_for_rounding(logits(twin), before)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert torch.equal(logits(model), before)


def test_disk_offload_while_it_loads(folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = load(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if is_factor(name))
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("_payload")} == {torch.uint8}
    for _ in range(2):
        assert_equal_but_for_rounding(logits(model), logits(load(folder)))
    model.save_pretrained(tmp_path / "saved")
    assert "offloaded modules" in str(recwarn.pop(UserWarning).message)
    assert_same_tensors(load(tmp_path / "saved"), load(folder))


def test_offload_of_a_loaded_model(folder: Path, tmp_path: Path) -> None:
    expected = logits(load(folder))
    in_memory, on_disk = cpu_offload(load(folder), execution_device="cpu"), load(folder)
    disk_offload(on_disk, tmp_path, execution_device="cpu")
    for model in (in_memory, on_disk):
        assert all(parameter.is_meta for name, parameter in model.named_parameters() if is_factor(name))
        assert_equal_but_for_rounding(logits(model), expected)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_decoded_experts_are_kept_within_a_budget(folder: Path, share: float) -> None:
    model = load(folder)
    expected = logits(model)
    layout = globe_modules(model)[0].globe_layout
    whole = LAYERS * E * 3 * layout.intermediate_size * layout.hidden_size * 4
    cache = set_compose_cache(model, int(share * whole))
    for _ in range(2):
        assert_equal_but_for_rounding(logits(model), expected, units=20)
    assert 0 < cache.resident_bytes <= share * whole
    assert cache.hits > 0
    if share == 1:
        assert cache.hits == cache.misses  # nothing is decoded twice
    with torch.no_grad():
        globe_modules(model)[0].get_parameter("globe_down_expert_scales").sub_(600)  # to nothing, nearly
    assert (logits(model) - expected).abs().max() > 0.01


def test_it_is_made_dense_in_memory(made: Callable[..., Path], tmp_path: Path) -> None:
    model, dense = (load(made() / name) for name in ("coded", "dense"))
    model.dequantize()
    assert not globe_modules(model)
    assert not [key for module in model.modules() for key in vars(module) if key.startswith("globe")]
    assert_same_tensors(model, dense)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_tensors(load(tmp_path), dense)


# training beside it


def test_gradients_pass_through_coded_experts(made: Callable[..., Path]) -> None:
    """To inputs and to what is trained outside of the experts, as through the dense ones."""
    found: list[dict[str, Tensor]] = []
    for name in ("coded", "dense"):
        model = load(made() / name).train()
        inputs = model.get_input_embeddings()(token_ids()).detach().requires_grad_()
        model(inputs_embeds=inputs, labels=token_ids()).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and ".experts." not in n}
        assert inputs.grad is not None
        found.append({"inputs": inputs.grad, **gradients})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert any("q_proj" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-6)
    assert ours["inputs"].abs().max() > 0


def test_a_parameter_beside_the_experts_learns(folder: Path) -> None:
    model = load(folder).train()
    model.activation_checkpointing_enable()
    down = torch.zeros(model.config.hidden_size, 4, requires_grad=True)
    up = torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(0)) / 8
    embedded = model.get_input_embeddings()(token_ids()).detach()
    optimizer, losses = torch.optim.Adam([down], lr=0.02), list[float]()
    for _ in range(6):
        loss = model(inputs_embeds=embedded + embedded @ down @ up, labels=token_ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if is_factor(name))


def test_training_it_all_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="fine-tuning on purely quantized models"):
        validate_quantization_for_training(load(folder))


def test_sharding_is_refused_by_name(folder: Path) -> None:
    module = globe_modules(load(folder))[0]
    module._is_hooked = True
    states = torch.randn(3, module.globe_layout.hidden_size)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="coded experts cannot be sharded"):
        module(states, torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5))


# what is refused


def rewritten(folder: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy whose coded tensors of layer 1 are changed."""
    copied = shutil.copytree(folder, tmp_path / "copy")
    path = next(path for path in copied.glob("*.safetensors") if any(f"{X}.globe" in name for name in load_file(path)))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    return copied


def wider(tensors: dict[str, Tensor]) -> None:
    """A row of down gets another width."""
    widths = tensors[f"{X}.globe_down_row_widths"]
    widths[3, 5] ^= 1


def left_out(tensors: dict[str, Tensor]) -> None:
    widths = tensors[f"{X}.globe_down_row_widths"]
    widths[tuple((widths & 15 > 0).nonzero()[0])] &= 0xF0


def dearer(tensors: dict[str, Tensor]) -> None:
    """The rows of an expert of gate get other widths."""
    tensors[f"{X}.globe_gate_expert_costs"][2] += 256


def flipped(tensors: dict[str, Tensor]) -> None:
    """One bit of a side tensor."""
    tensors[f"{X}.globe_up_input_costs"].view(torch.uint8)[7] ^= 64


def enormous(tensors: dict[str, Tensor]) -> None:
    tensors[f"{X}.globe_down_expert_scales"][0] = 32000


def stretched(tensors: dict[str, Tensor]) -> None:
    """A scale of an output that is beyond what is written."""
    tensors[f"{X}.globe_up_output_scales"][3, 1] = -128


@pytest.mark.parametrize("change", [wider, left_out, dearer, flipped, enormous, stretched])
def test_rows_and_paths_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object]
) -> None:
    copied = rewritten(folder, tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"rows and paths that do not fit each other in {X}\.(gate|up|down)"):
        load(copied)
    with pytest.raises(CheckpointError, match=r"rows and paths of layer 1 (gate|up|down) do not fit each other"):
        export_dense(copied, tmp_path / "dense", verify=False)
    with pytest.raises(CheckpointError, match="changed since it was written"):
        export_dense(copied, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    ("change", "load_message", "export_message"),
    [
        (
            lambda tensors: tensors.pop(f"{X}.globe_down_row_widths"),
            f"lacks {X}.globe_down_row_widths",
            "globe_down_row_widths",
        ),
        (
            lambda tensors: tensors.update({f"{X}.globe_up_payload": tensors[f"{X}.globe_up_payload"][:-1].clone()}),
            "has factors of a wrong shape,.*globe_up_payload",
            "globe_up_payload is torch.uint8 of shape",
        ),
        (
            lambda tensors: tensors.update({f"{X}.globe_up_more": torch.zeros(3)}),
            f"has {X}.globe_up_more: its config.json does not mention",
            None,
        ),
    ],
)
def test_parts_that_are_not_as_described_are_refused(
    folder: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    load_message: str,
    export_message: str | None,
) -> None:
    copied = rewritten(folder, tmp_path, change)
    with pytest.raises(CheckpointError, match=load_message):
        load(copied)
    if export_message is not None:
        with pytest.raises(CheckpointError, match=export_message):
            export_dense(copied, tmp_path / "dense", verify=False)


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_of_the_format_is_refused(folder: Path, tmp_path: Path, version: int) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (copied / "config.json").write_text(json.dumps(config))
    message = f"format_version 2; found {version}. Install the version of globe-moe that wrote the checkpoint"
    with pytest.raises(CheckpointError, match=message):
        load(copied)
    with pytest.raises(CheckpointError, match=message):
        export_dense(copied, tmp_path / "dense", verify=False)


def test_a_coded_layer_without_experts_is_refused(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["coded"][0]["layer"] = LAYERS
    with pytest.raises(CheckpointError, match=rf"layer {LAYERS} gate for layers \[{LAYERS}\], but .* \[0, 1\] only"):
        load(folder, config=config)


def test_stock_transformers_stops_at_the_tripwire(fresh: FreshProcess, folder: Path) -> None:
    (name,) = (name for name, tensor in open_checkpoint(folder).tensors.items() if tensor.shape == (1, 1, 1))
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    result = fresh.run(LOAD, folder)
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    assert "MISMATCH" in result.stderr
