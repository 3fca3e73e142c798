from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from globe.checkpoint.layout import (
    ExpertLayer,
    LanguageModel,
    dtype_notes,
    find_expert_layers,
    source_names,
    stated_model,
)
from globe.checkpoint.reader import open_checkpoint
from globe.errors import CheckpointError, UnsupportedModelError
from globe.terms import FAMILIES

TINY = LanguageModel("tiny_moe")
X = "model.layers.0.mlp.experts"
Make = Callable[..., dict[str, Tensor]]
Find = Callable[..., list[ExpertLayer]]


@pytest.fixture
def find(write_checkpoint: Callable[..., Path]) -> Find:
    numbers = itertools.count()

    def find(tensors: dict[str, Tensor], config: Any = None, model: LanguageModel = TINY) -> list[ExpertLayer]:
        folder = write_checkpoint({"model.safetensors": tensors}, config or {}, f"source{next(numbers)}")
        return find_expert_layers(open_checkpoint(folder), model)

    return find


@pytest.mark.parametrize(
    ("layout", "projections"),
    [
        ("plain", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", ("w1", "w3", "w2")),
        ("fused", ("gate_up_proj", "gate_up_proj", "down_proj")),
    ],
)
def test_each_layout_is_recognised(
    find: Find, expert_tensors: Make, layout: str, projections: tuple[str, str, str]
) -> None:
    tensors = expert_tensors(layout, dtype=torch.bfloat16)
    (layer,) = find(tensors)
    kind = "fused" if layout == "fused" else "per_expert"
    assert layer == ExpertLayer(
        0,
        X,
        kind,
        projections,
        num_experts=3,
        intermediate_size=2,
        hidden_size=4,
        dtype="BF16",
        stored_dtypes=("BF16",),
    )
    names = [name for family in ("gate", "up", "down") for name in source_names(layer, family)]
    assert set(names) == set(tensors)


@pytest.mark.parametrize(
    "prefix",
    [
        "model.layers.{}.mlp.experts",
        "model.language_model.layers.{}.mlp.experts",
        "layers.{}.feed_forward.experts",
        "model.layers.{}.block_sparse_moe.experts",
        "backbone.layers.{}.experts",
    ],
)
def test_layers_come_in_order_under_any_prefix(find: Find, expert_tensors: Make, prefix: str) -> None:
    tensors = {}
    for index in (10, 2, 0):
        tensors |= expert_tensors("plain", prefix.format(index))
    assert [(layer.index, layer.prefix) for layer in find(tensors)] == [(i, prefix.format(i)) for i in (0, 2, 10)]


def test_shared_experts_routers_and_dense_layers_are_not_experts(find: Find, expert_tensors: Make) -> None:
    tensors = expert_tensors("plain") | {
        "model.layers.0.mlp.gate.weight": torch.zeros(3, 4),
        "model.layers.0.mlp.shared_expert.up_proj.weight": torch.zeros(5, 4),
        "model.layers.0.mlp.shared_expert_gate.weight": torch.zeros(1, 4),
        "model.layers.0.mlp.shared_experts.up_proj.weight": torch.zeros(5, 4),
        "model.layers.1.mlp.up_proj.weight": torch.zeros(5, 4),
    }
    assert [layer.index for layer in find(tensors)] == [0]


def test_prediction_heads_are_left_out(find: Find, expert_tensors: Make) -> None:
    tensors = expert_tensors("plain", X) | expert_tensors("plain", "mtp.layers.0.mlp.experts")
    tensors |= expert_tensors("plain", "model.layers.1.mlp.experts")
    assert [layer.prefix for layer in find(tensors, model=LanguageModel("tiny_moe", num_layers=1))] == [X]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.0.mlp.up_proj.weight"], r"model_type llama, .* not a mixture of experts"),
        (["transformer.blocks.0.ffn.experts.mlp.w1"], "arranged in a way that GloBE does not know: transformer.blocks"),
        (["model.layers.0.moe.input_linear.weight"], "does not know: .*input_linear"),
        (["model.layers.0.block_sparse_moe.input_linear.weight"], "block_sparse_moe has no down projections"),
    ],
)
def test_a_model_without_experts_is_refused(find: Find, names: list[str], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find({name: torch.zeros(2, 2) for name in names}, {"model_type": "llama"})


@pytest.mark.parametrize(
    "name",
    [
        f"{X}.gate_up_proj_bias",
        f"{X}.0.gate_proj.bias",
        f"{X}.0.gate_proj.weight_scale_inv",
        f"{X}.0.side_proj.weight",
        f"{X}.router.weight",
    ],
)
@pytest.mark.parametrize("layout", ["plain", "fused"])
def test_tensors_that_are_not_understood_are_listed(find: Find, expert_tensors: Make, layout: str, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"holds 1 tensors that GloBE does not understand: {name}"):
        find(expert_tensors(layout) | {name: torch.zeros(2)})


def test_a_mixture_of_both_layouts_is_refused(find: Find, expert_tensors: Make) -> None:
    with pytest.raises(UnsupportedModelError, match="does not understand"):
        find(expert_tensors("plain") | expert_tensors("fused"))


@pytest.mark.parametrize("layout", ["plain", "mixtral"])
@pytest.mark.parametrize(("family", "position"), [("gate", 0), ("up", 1), ("down", 2)])
def test_a_missing_family_is_refused(find: Find, expert_tensors: Make, layout: str, family: str, position: int) -> None:
    projection = {"plain": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}[layout][position]
    tensors = {name: tensor for name, tensor in expert_tensors(layout).items() if f".{projection}." not in name}
    with pytest.raises(UnsupportedModelError, match=f"no {family} projections"):
        find(tensors)


def test_missing_experts_are_named(find: Find, expert_tensors: Make) -> None:
    whole = expert_tensors("plain")
    with pytest.raises(CheckpointError, match=f"1 expert tensors are missing: {X}.1.up_proj.weight"):
        find({name: tensor for name, tensor in whole.items() if name != f"{X}.1.up_proj.weight"})


def test_a_missing_expert_number_is_found(find: Find, expert_tensors: Make) -> None:
    tensors = {name: tensor for name, tensor in expert_tensors("plain").items() if ".1." not in name}
    with pytest.raises(CheckpointError, match="expert 1 is missing; there are 2 experts numbered up to 2"):
        find(tensors)


@pytest.mark.parametrize(
    ("layout", "name", "shape"),
    [
        ("plain", f"{X}.1.up_proj.weight", (3, 4)),
        ("plain", f"{X}.2.down_proj.weight", (2, 4)),
        ("fused", f"{X}.down_proj", (3, 2, 3)),
        ("fused", f"{X}.down_proj", (2, 4, 2)),
        ("fused", f"{X}.gate_up_proj", (3, 5, 4)),
        ("fused", f"{X}.gate_up_proj", (3, 4, 4, 1)),
        ("plain", f"{X}.0.gate_proj.weight", (4,)),
        ("plain", f"{X}.0.gate_proj.weight", (0, 4)),
    ],
)
def test_unequal_shapes_are_refused_with_the_tensor_s_name(
    find: Find, expert_tensors: Make, layout: str, name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        find(expert_tensors(layout) | {name: torch.zeros(shape)})


def test_shapes_tell_whether_fused_experts_are_transposed(find: Find) -> None:
    for P, D in itertools.product(range(1, 7), repeat=2):
        plain = {f"{X}.gate_up_proj": torch.zeros(3, 2 * P, D), f"{X}.down_proj": torch.zeros(3, D, P)}
        for transposed in (False, True):
            (layer,) = find({name: t.mT.contiguous() if transposed else t for name, t in plain.items()})
            assert (layer.num_experts, layer.intermediate_size, layer.hidden_size) == (3, P, D)
            assert (layer.transposed, layer.interleaved) == (transposed, False)


def test_gpt_oss_alternates_gate_and_up_and_keeps_its_biases(find: Find, expert_tensors: Make) -> None:
    biases = {f"{X}.gate_up_proj_bias": torch.zeros(3, 4), f"{X}.down_proj_bias": torch.zeros(3, 4)}
    (layer,) = find(expert_tensors("fused") | biases, model=LanguageModel("gpt_oss"))
    assert layer.interleaved
    assert {name for family in FAMILIES for name in source_names(layer, family)} == set(expert_tensors("fused"))


@pytest.mark.parametrize("num_unused", [0, 1, 2])
def test_gates_without_a_down_projection_are_allowed_for_identity_experts_only(
    find: Find, expert_tensors: Make, num_unused: int
) -> None:
    tensors = expert_tensors("plain")
    for projection, expert in itertools.product(("gate_proj", "up_proj"), range(num_unused)):
        tensors[f"{X}.{3 + expert}.{projection}.weight"] = torch.zeros(2, 4)
    (layer,) = find(tensors, model=LanguageModel("longcat_flash", num_identity=2))
    assert (layer.num_experts, layer.num_unused) == (3, num_unused)
    assert {name for family in FAMILIES for name in source_names(layer, family)} == set(tensors)
    if num_unused:
        with pytest.raises(CheckpointError, match="down_proj"):
            find(tensors)


def test_experts_of_several_dtypes_are_read_in_one_that_holds_all(find: Find, expert_tensors: Make) -> None:
    tensors = expert_tensors("plain", dtype=torch.float16)
    name = f"{X}.1.up_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    (layer,) = find(tensors)
    assert (layer.dtype, layer.stored_dtypes) == ("F32", ("BF16", "F16"))
    assert "1 layers have experts in BF16 and F16" in dtype_notes([layer])[0]


def test_quantised_sources_are_refused(find: Find, expert_tensors: Make) -> None:
    with pytest.raises(UnsupportedModelError, match="gptq"):
        find(expert_tensors("plain"), {"quantization_config": {"quant_method": "gptq"}})


def test_two_sets_of_experts_in_a_layer_are_refused(find: Find, expert_tensors: Make) -> None:
    tensors = expert_tensors("plain") | expert_tensors("plain", "model.layers.0.vision_moe.experts")
    with pytest.raises(UnsupportedModelError, match="layer 0 has two sets of experts"):
        find(tensors)


FLAT = {"model_type": "tiny_moe", "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FLAT, LanguageModel("tiny_moe", 3)),
        (FLAT | {"zero_expert_num": 2, "torch_dtype": "float16"}, LanguageModel("tiny_moe", 3, 2, "F16")),
        (FLAT | {"zero_expert_num": None, "dtype": "int8"}, LanguageModel("tiny_moe", 3)),
        ({"model_type": "seeing", "text_config": FLAT, "dtype": "float32"}, LanguageModel("tiny_moe", 3, 0, "F32")),
        (FLAT | {"text_config": FLAT}, None),
        ({"model_type": "tiny_moe"}, None),
        ({"num_hidden_layers": 3}, None),
        (FLAT | {"num_hidden_layers": None}, None),
        (FLAT | {"num_hidden_layers": "3"}, None),
        (FLAT | {"zero_expert_num": "2"}, None),
        ({"model_type": "seeing", "text_config": "elsewhere"}, None),
        ({"model_type": "seeing", "text_config": {"num_hidden_layers": 3}}, None),
    ],
)
def test_what_config_json_itself_says_of_the_language_model(
    config: dict[str, Any], expected: LanguageModel | None
) -> None:
    assert stated_model(config) == expected


def test_experts_of_integers_are_refused(find: Find) -> None:
    granite = "model.layers.0.block_sparse_moe"
    tensors = {
        f"{granite}.input_linear.weight": torch.ones(3, 4, 4, dtype=torch.int8),
        f"{granite}.output_linear.weight": torch.ones(3, 4, 2, dtype=torch.int8),
    }
    with pytest.raises(UnsupportedModelError, match=r"input_linear\.weight is I8; experts must be of F64, F32"):
        find(tensors)
