"""Quantised sources from end to end, against the model that transformers itself dequantises from the same files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

from globe import CompressConfig, UnsupportedModelError, compress
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.errors import CheckpointError, GlobeError
from globe.model.source import open_source
from globe.run.export import export_dense
from tests.conformance.quantise import BLOCK, INT4, change_config, write_quantised, write_shards
from tests.conformance.tiny import load, logits

EXACT = CompressConfig(rank_ratio=1, basis_ratio=1, activation="identity", steps=5, factor_dtype="float32")
LOSSY = CompressConfig(keep=0.7, steps=3)
CODED = CompressConfig(bits=4)


@dataclasses.dataclass(frozen=True)
class Quantised:
    method: str
    folder: Path
    plain: dict[str, Tensor]
    """The source's tensors before they were quantised; of int4, what the quantised ones stand for."""

    @property
    def source(self) -> Path:
        return self.folder / "source"


@pytest.fixture(scope="module", params=["fp8", "mxfp4", "int4"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    folder = tmp_path_factory.mktemp(request.param)
    return Quantised(request.param, folder, write_quantised(request.param, folder / "source"))


@pytest.fixture(scope="module")
def reference(quantised: Quantised) -> PreTrainedModel:
    """The model in bfloat16, dequantised by transformers, but int4 (which needs another package) by the suite."""
    settings: dict[str, Any] = {"dtype": torch.bfloat16}
    if quantised.method == "int4":
        plain = quantised.folder / "plain"
        shutil.copytree(quantised.source, plain, ignore=shutil.ignore_patterns("*.safetensors", "*.py"))
        write_shards(plain, (quantised.plain,))
        config = json.loads((plain / "config.json").read_text())
        del config["quantization_config"], config["auto_map"]
        (plain / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
        return AutoModelForCausalLM.from_pretrained(plain, **settings).eval()
    settings["quantization_config"] = {
        "fp8": FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK)),
        "mxfp4": Mxfp4Config(dequantize=True),
    }[quantised.method]
    return AutoModelForCausalLM.from_pretrained(quantised.source, **settings).eval()


def test_nothing_compressed_away_leaves_the_logits(quantised: Quantised, reference: PreTrainedModel) -> None:
    compress(quantised.source, quantised.folder / "exact", EXACT)
    assert config_of(quantised.folder / "exact")["quantization_config"]["quant_method"] == "globe"
    ours = logits(load(quantised.folder / "exact"))
    torch.testing.assert_close(ours, logits(reference.float()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [LOSSY, CODED], ids=["banks", "coded"])
def test_a_lossy_run_exports_a_plain_model_with_its_logits(
    quantised: Quantised, tmp_path: Path, config: CompressConfig
) -> None:
    report = compress(quantised.source, tmp_path / "lossy", config)
    if config.is_coded:
        assert report.bits is not None
        assert 3.95 < report.bits <= 4
        assert report.uniform_because is None  # measured a layer at a time, on random tokens
        assert report.uncalibrated_because is not None
        assert "the source is quantised; run a layer at a time" in report.uncalibrated_because
    export_dense(tmp_path / "lossy", tmp_path / "dense")
    ours, theirs = (logits(load(tmp_path / name)) for name in ("lossy", "dense"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)  # the dense experts are rounded to bfloat16

    dense = open_checkpoint(tmp_path / "dense")
    config = config_of(dense.folder)
    assert "quantization_config" not in config
    assert "auto_map" not in config
    assert config["model_type"] in ("deepseek_v3", "gpt_oss")
    assert {name: (t.dtype, t.shape) for name, t in dense.tensors.items()} == {
        name: ("F32" if tensor.dtype == torch.float32 else "BF16", tuple(tensor.shape))
        for name, tensor in quantised.plain.items()
    }
    assert dense.shards == tuple(
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2)
    )  # the third had scales
    source = open_source(quantised.source)
    for name in dense.tensors:
        if ".experts." not in name or name.endswith("bias"):
            assert torch.equal(dense.read(name), source.read(name)), name


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_the_view_is_what_transformers_dequantises(quantised: Quantised, reference: PreTrainedModel) -> None:
    source: Checkpoint = open_source(quantised.source)
    assert source.tensors.keys() == quantised.plain.keys()
    state = reference.bfloat16().state_dict()
    compared = 0
    for name, tensor in source.read_many(source.tensors):
        assert (name, tensor.shape) == (name, quantised.plain[name].shape)
        if name in state:
            assert torch.equal(tensor.bfloat16(), state[name]), name
            compared += 1
        error = (tensor - quantised.plain[name]).float().norm() / quantised.plain[name].float().norm().clamp(min=1)
        assert error < {"fp8": 0.05, "mxfp4": 0.2, "int4": 1e-6}[quantised.method]
    assert compared > 10


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("fp8", {"weight_block_size": None}, "fp8 without weight_block_size"),
        ("fp8", {"activation_scheme": "static"}, "static activations"),
        ("fp8", {"quant_method": "gptq"}, r"is quantised \(gptq"),
        ("int4", {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        (
            "int4",
            {"config_groups": {"0": {"weights": {**INT4["config_groups"]["group_0"]["weights"], "num_bits": 3}}}},
            "'num_bits': 3",
        ),
        (
            "int4",
            {"config_groups": {"0": {"weights": {**INT4["config_groups"]["group_0"]["weights"], "symmetric": False}}}},
            "'symmetric': False",
        ),
    ],
)
def test_other_forms_are_refused_by_name(tmp_path: Path, method: str, changes: dict[str, Any], message: str) -> None:
    write_quantised(method, tmp_path / "source")
    section = config_of(tmp_path / "source")["quantization_config"]
    change_config(tmp_path / "source", section | changes)
    with pytest.raises(UnsupportedModelError, match=message):
        compress(tmp_path / "source", tmp_path / "out", LOSSY)


def test_a_weight_without_its_scale_is_refused_by_name(tmp_path: Path) -> None:
    write_quantised("fp8", tmp_path / "source")
    checkpoint = open_checkpoint(tmp_path / "source")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    write_shards(
        tmp_path / "source", ({k: t for k, t in checkpoint.read_many(checkpoint.tensors) if k != f"{name}_scale_inv"},)
    )
    with pytest.raises(UnsupportedModelError, match=f"not in the form that GloBE knows of it: {name}"):
        compress(tmp_path / "source", tmp_path / "out", LOSSY)


def test_a_scale_of_another_shape_is_damage(tmp_path: Path) -> None:
    write_quantised("fp8", tmp_path / "source")
    checkpoint = open_checkpoint(tmp_path / "source")
    tensors = dict(checkpoint.read_many(checkpoint.tensors))
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    write_shards(tmp_path / "source", ({**tensors, name: tensors[name][:1]},))
    with pytest.raises(CheckpointError, match=f"{name} is F32 of shape"):
        compress(tmp_path / "source", tmp_path / "out", LOSSY)


def rewrite(folder: Path, part: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change every tensor whose name ends in `part`."""
    checkpoint = open_checkpoint(folder)
    tensors = dict(checkpoint.read_many(checkpoint.tensors))
    write_shards(folder, ({name: change(t) if name.endswith(part) else t for name, t in tensors.items()},))


def test_a_scale_for_each_row_may_lie_in_one_dimension(tmp_path: Path) -> None:
    write_quantised("int4", tmp_path / "source")
    section = config_of(tmp_path / "source")["quantization_config"]
    section["config_groups"]["group_0"]["weights"]["strategy"] = "channel"
    change_config(tmp_path / "source", section)
    rewrite(tmp_path / "source", "_scale", lambda scale: scale[:, :1].contiguous())
    columns = open_source(tmp_path / "source")
    expected = dict(columns.read_many(columns.tensors))
    rewrite(tmp_path / "source", "_scale", lambda scale: scale.flatten())
    rows = open_source(tmp_path / "source")
    found = dict(rows.read_many(rows.tensors))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("method", "part", "change", "message"),
    [
        ("int4", "_scale", lambda t: t.flatten()[:-1].clone(), "_scale is BF16 of shape"),
        ("int4", "_scale", lambda t: t[:, :0].clone(), "_scale is BF16 of shape"),
        ("int4", "_scale", lambda t: t.to(torch.int32), "_scale is I32"),
        ("int4", "_shape", lambda t: t[0].clone(), r"_shape is I64 of shape \(\)"),
        ("int4", "_packed", lambda t: t.flatten(), "not in the form that GloBE knows"),
        ("int4", "_packed", lambda t: t.to(torch.int64), "not in the form that GloBE knows"),
        ("fp8", "_scale_inv", lambda t: t.flatten(), "_scale_inv is F32 of shape"),
        ("fp8", "_scale_inv", lambda t: t.to(torch.int32), "_scale_inv is I32"),
        ("mxfp4", "_blocks", lambda t: t[..., :8].clone(), "not in the form that GloBE knows"),
        ("mxfp4", "_scales", lambda t: t.float(), "_scales is F32"),
    ],
)
def test_parts_of_unusual_shapes_and_types_are_refused_by_name(
    tmp_path: Path, method: str, part: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    write_quantised(method, tmp_path / "source")
    rewrite(tmp_path / "source", part, change)
    with pytest.raises(GlobeError, match=message):
        open_source(tmp_path / "source")


@pytest.mark.parametrize(
    "section",
    [
        "fp8",
        ["fp8"],
        4,
        {"quant_method": ["fp8"]},
        {"quant_method": "fp8", "weight_block_size": [True, 8]},
        {"quant_method": "fp8", "weight_block_size": [0, 8]},
        {"quant_method": "fp8", "weight_block_size": 8},
        {"quant_method": "compressed-tensors", "config_groups": []},
        {"quant_method": "compressed-tensors", "config_groups": {"0": "int4"}},
        {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": ["int4"]}}},
    ],
)
def test_a_section_that_says_something_else_is_refused_by_name(tmp_path: Path, section: Any) -> None:
    write_quantised("int4", tmp_path / "source")
    change_config(tmp_path / "source", section)
    with pytest.raises(UnsupportedModelError, match=r"is quantised \("):
        open_source(tmp_path / "source")
