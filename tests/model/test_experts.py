from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from globe.errors import UnsupportedModelError
from globe.model import bank_module
from globe.model.bank_module import Bank, BankUse
from globe.model.expert_modules import experts_layout, find_experts
from globe.model.experts import factorise
from tests.model.compressed import (
    BANK_SETS,
    FAMILIES,
    FAMILY_SETTINGS,
    LAYERS,
    D,
    E,
    P,
    bank,
    composed,
    logits,
    source_family,
    token_ids,
    write_compressed,
)
from tests.model.conftest import Make


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path)


def exact_factors(source: Path, names: Any) -> dict[str, Tensor]:
    """Factors that reproduce the source's own tensors: an SVD each, one basis per expert, one-hot codes, no φ."""
    factors: dict[str, Tensor] = {}
    stacks: dict[tuple[int, str], dict[int, Tensor]] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if family := source_family(name):
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            stacks.setdefault((numbers[0], family), {})[numbers[1]] = tensor.T if family == "down" else tensor
    for (layer, family), matrices in stacks.items():
        U, S, Vh = torch.linalg.svd(torch.stack([matrices[e] for e in range(E)]).double(), full_matrices=False)
        factors[names.adapters(layer, family)] = (U * S[:, None, :]).float().contiguous()
        factors[names.codes(layer, family)] = torch.eye(E)
        factors[names.bases(bank([layer], [family]))] = Vh.float().contiguous()
    return factors


@pytest.mark.parametrize("model_type", FAMILY_SETTINGS)
def test_factors_of_the_sources_own_tensors_give_the_source_back(
    compressed: Make, tmp_path: Path, model_type: str
) -> None:
    """Above all that Mixtral's w1 is the gate, w3 is up and w2 is down."""
    made = compressed(model_type, "per_family")
    banks = [bank([layer], [family], rank=P, num_bases=E) for layer in range(LAYERS) for family in FAMILIES]
    exact = write_compressed(tmp_path, model_type, banks, "identity", factors=exact_factors(made.source, made.names))
    torch.testing.assert_close(logits(load(exact.path)), logits(load(made.source)), atol=1e-5, rtol=1e-5)


def routed(top_k_index: list[list[int]], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.tensor(top_k_index)
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(len(index), D, generator=generator).to(dtype),
        index,
        torch.rand(*index.shape, generator=generator).to(dtype),
    )


def test_one_expert_against_the_modules_own_forward(compressed: Make) -> None:
    made = compressed("mixtral")
    model = load(made.path)
    for found in find_experts(made.dense):
        for expert in range(E):
            inputs = routed([[expert]])
            torch.testing.assert_close(model.get_submodule(found.path)(*inputs), found.module(*inputs))


def test_composes_only_the_experts_that_are_hit_in_one_call(compressed: Make) -> None:
    experts = load(compressed("qwen2_moe", "per_layer").path).model.layers[0].mlp.experts
    calls: list[int] = []
    experts.globe_banks["gate_up_down"].register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    experts(*routed([[3, 1], [1, 3], [3, 4]]))
    assert calls == [3 * len({1, 3, 4})]


def test_indices_past_the_experts_add_nothing(compressed: Make) -> None:
    """So transformers marks, in expert parallelism, the experts of other ranks."""
    experts = load(compressed("qwen2_moe").path).model.layers[1].mlp.experts
    states, _, weights = routed([[3, 1], [2, 0]])
    with_others = experts(states, torch.tensor([[3, E], [E, 0]]), weights)
    alone = experts(states, torch.tensor([[3], [0]]), torch.stack([weights[0, :1], weights[1, 1:]]))
    torch.testing.assert_close(with_others, alone)
    assert torch.equal(experts(states, torch.full((2, 2), E), weights), torch.zeros(2, D))
    assert experts(states[:0], torch.zeros(0, 2, dtype=torch.int64), weights[:0]).shape == (0, D)


def factor_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(token_ids(), labels=token_ids()).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if "globe_" in name}


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral"])
def test_gradients_reach_the_factors(compressed: Make, model_type: str) -> None:
    """As they do through the dense model's weights, when those are functions of the factors."""
    made = compressed(model_type, "shared_and_own")
    factors = {name: tensor.double().requires_grad_() for name, tensor in made.factors.items()}
    dense = AutoModelForCausalLM.from_pretrained(made.source, experts_implementation="eager").double()
    dense.load_state_dict(made.dense.state_dict())
    weights: dict[str, Tensor] = {}
    for layer, path in made.names.experts.items():
        parts = {"gate": dense.get_parameter(f"{path}.gate_up_proj")[:, :P]}
        parts["up"] = dense.get_parameter(f"{path}.gate_up_proj")[:, P:]
        for spec in BANK_SETS["shared_and_own"]:
            if layer in spec.layers:
                families = spec.families
                parts |= {f: composed(made.names, factors, spec, layer, f, "tanh") for f in families}
        weights[f"{path}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        weights[f"{path}.down_proj"] = parts["down"].transpose(1, 2)
    arguments = {"input_ids": token_ids(), "labels": token_ids()}
    loss = torch.func.functional_call(dense, weights, (), arguments).loss
    expected = torch.autograd.grad(loss, list(factors.values()))
    gradients = factor_gradients(load(made.path).train())
    for name, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(gradients[name].double(), gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("working_bytes", [1, 6000])
def test_small_pieces_change_nothing(compressed: Make, monkeypatch: pytest.MonkeyPatch, working_bytes: int) -> None:
    """One expert and one column at a time, or two and a few."""
    model = load(compressed("qwen3_moe", "shared_and_own").path)
    whole, gradients = logits(model), factor_gradients(model)
    monkeypatch.setattr(bank_module, "WORKING_BYTES", working_bytes)
    torch.testing.assert_close(logits(model), whole, atol=1e-5, rtol=1e-5)
    for name, gradient in factor_gradients(model).items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-5, rtol=1e-3)


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.bytes = max(self.bytes, *made, 0)
        return result


@pytest.mark.parametrize("training", [False, True])
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    num_experts, rows, columns, rank, num_bases = 32, 32, 128, 32, 16
    config = AutoConfig.for_model("qwen3_moe", num_experts=num_experts, moe_intermediate_size=rows, hidden_size=columns)
    module = Qwen3MoeExperts(config)
    uses = [BankUse(Bank((num_bases, rank, columns), "tanh", torch.float32, torch.device("cpu")), FAMILIES, own="own")]
    factorise(module, experts_layout(module), uses)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    budget = 64 * 1024
    monkeypatch.setattr(bank_module, "WORKING_BYTES", budget)
    states, weights = torch.randn(20, columns), torch.rand(20, 4)
    index = torch.stack([torch.randperm(num_experts)[:4] for _ in range(20)])
    with LargestTensor() as largest, torch.set_grad_enabled(training):
        output = module(states, index, weights)
    assert 0 < largest.bytes <= budget
    dense_bytes = 4 * num_experts * 3 * rows * columns
    assert dense_bytes > 20 * budget
    if training:
        with LargestTensor() as largest:
            output.sum().backward()
        assert largest.bytes <= max(4 * parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("families", [FAMILIES, ("up",), ("down",)])
def test_transposed_interleaved_biased_experts(families: tuple[str, ...]) -> None:
    """gpt_oss: gate and up alternate along the last axis, with biases and a gate function of its own."""
    config = AutoConfig.for_model("gpt_oss", hidden_size=D, intermediate_size=P, num_local_experts=E)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    original, module = GptOssExperts(config), GptOssExperts(config)
    dense = {name: torch.randn_like(parameter) for name, parameter in module.named_parameters()}
    module.load_state_dict(dense)
    inputs = routed([[0, 3], [5, 1], [3, 2]])
    uses = [BankUse(Bank((4, 5, D), "tanh", torch.float32, torch.device("cpu")), families, own="own")]
    factorise(module, experts_layout(module), uses)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "globe_gate_dense":
                parameter.copy_(dense["gate_up_proj"][..., ::2].transpose(1, 2))
            elif name not in dense:
                parameter.normal_(std=0.5)
        for family in families:
            codes, adapters = getattr(module, f"globe_{family}_codes"), getattr(module, f"globe_{family}_adapters")
            matrices = adapters @ torch.tanh(torch.einsum("ej,jrd->erd", codes, uses[0].bank.bases))
            if family == "down":
                dense["down_proj"] = matrices
            else:
                dense["gate_up_proj"][..., FAMILIES.index(family) :: 2] = matrices.transpose(1, 2)
        original.load_state_dict(dense)
        torch.testing.assert_close(module(*inputs), original(*inputs), atol=1e-4, rtol=1e-4)


def test_training_under_tensor_parallelism_is_refused(compressed: Make) -> None:
    model = load(compressed("qwen2_moe").path)
    experts = model.model.layers[0].mlp.experts
    experts._is_hooked = True  # transformers' mark of a sharded module
    model(token_ids())
    with pytest.raises(UnsupportedModelError, match="training GloBE experts under tensor or expert parallelism"):
        model.train()(token_ids())


def test_autocast_composes_in_float32(compressed: Make) -> None:
    experts = load(compressed("qwen2_moe", "per_layer").path).model.layers[0].mlp.experts
    made: list[Tensor] = []
    experts.globe_banks["gate_up_down"].register_forward_hook(lambda _, __, output: made.append(output))
    inputs = routed([[0, 1]])
    experts(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        experts(*inputs)
    assert made[1].dtype == torch.float32
    assert torch.equal(made[0], made[1])
