"""What transformers makes of a source is what GloBE makes of it, and what it would make up is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from globe import CompressConfig, compress, export_dense
from globe.checkpoint.side_files import CONFIG
from globe.cli.main import main
from globe.errors import CheckpointError, UnsupportedModelError
from globe.measure.samples import sample_windows
from globe.measure.sensitivity import random_windows
from globe.model.configuration import expert_layers
from globe.model.loading import check_weights, empty_language_model, empty_model, load
from globe.model.source import open_source
from tests.conformance.families import COMPOSITES, SETTINGS
from tests.conformance.quantise import write_quantised
from tests.conformance.tiny import Case, auto_class, logits, write
from tests.model.compressed import tiny_config

WEIGHTS = "model.safetensors"
UNRUN = CompressConfig(keep=0.7, steps=1, calibrate="none", allocation="uniform")
RUN = CompressConfig(keep=0.7, steps=1)
Change = Callable[[dict[str, Tensor]], Any]


def write_tiny(folder: Path, change: Change | None = None, family: str = "qwen3_moe", **entries: Any) -> Path:
    """A tiny source whose tensors and config.json are changed."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(folder)
    if change is not None:
        change_tensors(folder, change)
    change_config(folder, **entries)
    return folder


def change_tensors(folder: Path, change: Change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def change_config(folder: Path, **entries: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def check(folder: Path) -> None:
    source = open_source(folder)
    check_weights(source, empty_model(source))


@pytest.mark.parametrize("family", [*SETTINGS, *COMPOSITES])
@pytest.mark.parametrize("layout", ["saved", "fused"])
def test_what_transformers_would_make_up_is_refused(tmp_path: Path, family: str, layout: str) -> None:
    """Its own report of the real load is the reference."""
    write(Case(family, layout), tmp_path)
    check(tmp_path)
    source = open_source(tmp_path)
    whole = {name: source.read(name) for name in source.tensors}
    names = [name for name in whole if ".experts." not in name and not name.endswith("bias")]
    gone, resized = names[len(names) // 2], names[len(names) // 3]
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    lacking = {name: tensor for name, tensor in whole.items() if name != gone}
    for tensors, kind, fault in (
        (lacking, "missing_keys", "lacks tensors of"),
        ({**whole, resized: torch.cat([whole[resized]] * 2)}, "mismatched_keys", "has tensors of another shape than"),
    ):
        save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
        _, report = auto_class(family).from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
        expected = [key if isinstance(key, str) else key[0] for key in report[kind]]
        assert expected
        with pytest.raises(CheckpointError, match=fault) as found:
            check(tmp_path)
        assert all(key in str(found.value) for key in expected[:4])
        assert "random numbers" in str(found.value)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "int4"])
def test_a_quantised_source_is_checked_as_what_it_stands_for(tmp_path: Path, method: str) -> None:
    write_quantised(method, tmp_path)
    check(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (name,) = (name for name in content["weight_map"] if name.endswith("layers.1.post_attention_layernorm.weight"))
    shard = tmp_path / content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    save_file({key: tensor for key, tensor in load_file(shard).items() if key != name}, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks tensors of .*: {name};"):
        compress(tmp_path, tmp_path / "out", UNRUN)


def test_nothing_is_written_of_a_source_that_cannot_be_loaded(tmp_path: Path) -> None:
    router = "model.layers.1.mlp.gate.weight"
    source = write_tiny(tmp_path / "source", lambda tensors: tensors.pop(router))
    for settings in (UNRUN, RUN):
        with pytest.raises(CheckpointError, match=f"lacks tensors of Qwen3MoeForCausalLM: {router}; .* Download"):
            compress(source, tmp_path / "out", settings)
    with pytest.raises(CheckpointError, match=router):
        load(source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_classifier_is_compressed_as_one_and_not_run(tmp_path: Path) -> None:
    source = tmp_path / "source"
    AutoModelForSequenceClassification.from_config(tiny_config("qwen3_moe")).save_pretrained(source)
    for settings in (RUN, CompressConfig(keep=0.7, steps=1, calibrate="none")):
        with pytest.raises(CheckpointError, match=r"lm_head.weight; .* names Qwen3MoeForSeq.*--allocation uniform"):
            compress(source, tmp_path / "out", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    compress(source, tmp_path / "small", UNRUN)
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(report.values())
    change_tensors(source, lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(CheckpointError, match=r"lacks tensors of Qwen3MoeForSequenceClassification: score.weight"):
        compress(source, tmp_path / "other", UNRUN)


@pytest.mark.parametrize(
    ("change", "entries", "message"),
    [
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}), {}, "q_proj.bias"),
        (None, {"num_hidden_layers": 2}, r"would run without: model.layers.2.input_layernorm.weight"),
        (None, {"num_hidden_layers": 4}, r"lacks tensors of .*: model.layers.3.input_layernorm.weight"),
        (None, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (None, {"num_labels": 10**9}, "num_labels is 1000000000"),
        (None, {"vocab_size": 50}, r"lm_head.weight \(48, 16\) instead of \(50, 16\)"),
        (None, {"num_experts_per_tok": 7}, r"routes each token to 7 experts .*, and a layer has 6"),
        (None, {"num_experts_per_tok": "2"}, "num_experts_per_tok.* expected int, got str"),
        (None, {"rms_norm_eps": 1}, "rms_norm_eps.* expected float, got int"),
        (None, {"layer_types": ["a", "b", "c"]}, "layer_types"),
        (None, {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "cannot build .* 'spiral'"),
        (None, {"hidden_act": "spiral"}, "cannot build .* 'spiral'"),
        (None, {"num_attention_heads": 0}, "cannot build .*ZeroDivisionError"),
        (None, {"pad_token_id": 99}, "cannot build .*AssertionError"),
        (None, {"dtype": "float33"}, "float33"),
        (None, {"text_config": {"a": 1}}, "cannot build"),
        (None, {"rope_theta": {"__float__": "wide"}}, "does not accept .*'wide'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Change | None,
    entries: dict[str, Any],
    message: str,
) -> None:
    source = write_tiny(tmp_path / "source", change, **entries)
    with pytest.raises(CheckpointError, match=message):
        compress(source, tmp_path / "out", UNRUN)
    capsys.readouterr()
    assert main(["inspect", str(source), "--plan"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 600 + len(str(source))


@pytest.mark.parametrize("model_type", [None, "spiral"])
def test_an_unknown_model_is_said_to_be(tmp_path: Path, model_type: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="does not know the model_type"):
        compress(write_tiny(tmp_path / "source", model_type=model_type), tmp_path / "out", UNRUN)


def test_a_model_that_does_not_compute_is_refused_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path / "source", lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=r"tensor model.norm.weight holds NaN"):
        load(source)

    def overflow(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.gate.weight"].sign_().mul_(3e38)  # the softmax of infinities

    with pytest.raises(CheckpointError, match="computes NaN from its first tokens"):
        load(write_tiny(tmp_path / "overflowing", overflow))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("selected index k out of range")

    monkeypatch.setattr("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter.forward", fail)
    with pytest.raises(CheckpointError, match=r"cannot be run \(RuntimeError: selected index k out of range\)"):
        load(write_tiny(tmp_path / "whole"))


@pytest.mark.parametrize(
    "entries",
    [
        {"architectures": None},
        {"architectures": "Qwen3MoeForCausalLM"},
        {"architectures": [None, "Unheard", "LlamaForCausalLM"]},
        {"num_experts": 6, "num_local_experts": 6, "vocab_size": 48},
    ],
)
def test_entries_that_transformers_or_globe_pass_over(tmp_path: Path, entries: dict[str, Any]) -> None:
    source = write_tiny(tmp_path / "source", **entries)
    check(source)
    assert torch.equal(logits(load(source)), logits(load(write_tiny(tmp_path / "plain"))))


def test_tensors_beside_the_model_do_not_matter(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        head = {name: tensors[name].clone() for name in tensors if name.startswith("model.layers.2.")}
        tensors.update({f"mtp.{name}": tensor for name, tensor in head.items()})
        tensors.update({name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in head.items()})
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(16, 32)  # a head that predicts one more token
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(1)

    source = write_tiny(tmp_path / "source", add)
    check(source)
    assert [layer.index for layer in expert_layers(open_source(source))] == [0, 1, 2]


def test_a_layer_of_one_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("globe.measure.samples.NUM_SAMPLES", 4)
    config = tiny_config("qwen3_moe")
    config.num_experts = config.num_experts_per_tok = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    for settings in (UNRUN, RUN):
        out = tmp_path / f"out-{settings.calibrate}"
        compress(tmp_path / "source", out, settings)
        export_dense(out, tmp_path / f"dense-{settings.calibrate}")
        dense = logits(load(tmp_path / f"dense-{settings.calibrate}"))
        torch.testing.assert_close(logits(load(out)), dense, rtol=0, atol=1e-5)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True)
    check(source)
    change_config(source, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head.weight; .* Download"):
        check(source)


def test_entries_left_to_transformers_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As configurations that record differences only; the defaults are the class's own."""
    config = tiny_config("qwen3_moe")
    config.vocab_size, default = AutoConfig.for_model("qwen3_moe").vocab_size, AutoConfig.for_model("qwen3_moe")
    config.max_position_embeddings = default.max_position_embeddings
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    for key in ("vocab_size", "max_position_embeddings", "dtype"):
        del content[key]
    (tmp_path / CONFIG).write_text(json.dumps(content))
    windows = random_windows(load(tmp_path), 0)
    assert windows.shape == (8, 256)
    assert 100_000 < windows.max() < default.vocab_size
    monkeypatch.setattr("globe.measure.sensitivity.WINDOW", 4)
    compress(tmp_path, tmp_path / "out", CompressConfig(keep=0.7, steps=1, calibrate="none"))


@pytest.mark.parametrize("written", ["Infinity", '{"__float__": "Infinity"}'])
def test_numbers_that_json_cannot_carry_are_carried(tmp_path: Path, written: str) -> None:
    source = write_tiny(tmp_path / "source", family="mixtral", router_jitter_noise="X", nothing="Y")
    text = (source / CONFIG).read_text().replace('"X"', written).replace('"Y"', '[NaN, {"a": -Infinity}]')
    (source / CONFIG).write_text(text)
    assert AutoConfig.from_pretrained(source).router_jitter_noise == math.inf
    compress(source, tmp_path / "small", UNRUN)
    export_dense(tmp_path / "small", tmp_path / "dense")
    for folder in ("small", "dense"):
        json.loads((tmp_path / folder / CONFIG).read_text(), parse_constant=pytest.fail)
        config = AutoConfig.from_pretrained(tmp_path / folder)
        assert config.router_jitter_noise == math.inf
        assert math.isnan(config.nothing[0])
        assert config.nothing[1] == {"a": -math.inf}


TEXT = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 40, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.08,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
EYES = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}
LATENT = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
PICTURES: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "text_config": {**TEXT, "num_experts": 4, "head_dim": 16, "rope_parameters": ROPE},
        "vision_config": {
            **EYES, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
    },
    "kimi_k25": {
        "text_config": {
            **TEXT, **LATENT, "model_type": "deepseek_v3", "n_routed_experts": 4, "n_shared_experts": 1,
            "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "head_dim": 8,
        },
        "vision_config": {
            **EYES, "num_hidden_layers": 1, "num_attention_heads": 2, "pos_emb_height": 4, "pos_emb_width": 4,
            "pos_emb_time": 1,
        },
        "image_token_id": 5,
    },
}  # fmt: skip
"""Of text and pictures, and in AutoModelForImageTextToText only."""


@pytest.mark.parametrize("family", PICTURES)
def test_models_of_text_and_pictures_load_through_the_class_that_knows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr("globe.measure.samples.NUM_SAMPLES", 8)
    monkeypatch.setattr("globe.measure.samples.LENGTH", 32)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **PICTURES[family], tie_word_embeddings=False)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "source")
    report = compress(tmp_path / "source", tmp_path / "small", RUN)
    assert report.uncalibrated_because is report.uniform_because is None
    assert report.calibration is not None
    assert report.calibration.num_tokens == 8 * 32
    compress(tmp_path / "source", tmp_path / "unrun", UNRUN)
    export_dense(tmp_path / "small", tmp_path / "dense")
    small, dense = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("small", "dense"))
    torch.testing.assert_close(logits(small), logits(dense), rtol=0, atol=1e-5)
    loaded = load(tmp_path / "small")
    assert type(loaded) is type(model)
    pictures = torch.tensor([value for key, value in PICTURES[family].items() if key.endswith("_id")])
    for windows, length in ((sample_windows(loaded, 0), 32), (random_windows(loaded, 0), 64)):
        assert windows.shape == (8, length)
        assert not torch.isin(windows, pictures).any()
    change_tensors(tmp_path / "source", lambda tensors: tensors.pop(next(name for name in tensors if "vi" in name)))
    with pytest.raises(CheckpointError, match="lacks tensors of"):
        compress(tmp_path / "source", tmp_path / "other", UNRUN)


def test_a_model_without_a_language_model_is_said_to_be_none(tmp_path: Path) -> None:
    AutoConfig.for_model("vit", num_hidden_layers=1).save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="has no language model of model_type 'vit'") as found:
        empty_language_model(open_source(tmp_path))
    assert len(str(found.value)) < 300
    with pytest.raises(UnsupportedModelError, match="has no language model"):
        load(tmp_path)
