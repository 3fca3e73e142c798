"""Linear banks run from their factors against the same experts composed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from globe import set_compose_cache
from globe.model import bank_module
from globe.model.bank_module import Bank, BankUse
from globe.model.compose_cache import split_whole
from globe.model.expert_modules import experts_layout
from globe.model.experts import GlobeExperts, factorise
from globe.model.names import is_factor
from globe.model.sharing import is_cheaper
from tests.model.compressed import FAMILIES, D, E, P

CPU = torch.device("cpu")
SPLITS = ((FAMILIES,), (("gate", "up"), ("down",)), (("gate", "down"), ("up",)))


def experts(
    family: str = "qwen3_moe",
    split: tuple[tuple[str, ...], ...] = SPLITS[0],
    activation: str = "identity",
    dtype: torch.dtype = torch.float32,
) -> GlobeExperts:
    """An experts module of random factors, two bases of rank 5 for each family of a bank."""
    kind = {"qwen3_moe": Qwen3MoeExperts, "gpt_oss": GptOssExperts}[family]
    sizes = {"qwen3_moe": {"num_experts": E, "moe_intermediate_size": P}}
    config = AutoConfig.for_model(
        family, hidden_size=D, **sizes.get(family, {"num_local_experts": E, "intermediate_size": P})
    )
    module = kind(config).to(dtype).eval()
    torch.manual_seed(0)
    uses = [
        BankUse(Bank((2 * len(families), 5, D), activation, dtype, CPU), families, own="_".join(families))
        for families in split
    ]
    factorise(module, experts_layout(module), uses)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    assert any(is_factor(name) for name, _ in module.named_parameters())
    return module  # pyright: ignore[reportReturnType]


def inputs(index: list[list[int]], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(index))
    shape = len(index), 2
    states = torch.randn(len(index), D, generator=generator).to(dtype)
    return states, torch.tensor(index, dtype=torch.int64).view(shape), torch.rand(shape, generator=generator).to(dtype)


class Compositions:
    """Counts the calls that compose."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        for bank in module.modules():
            if isinstance(bank, Bank):
                bank.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


routes = st.lists(st.lists(st.integers(0, E), min_size=2, max_size=2, unique=True), min_size=1, max_size=6)


@given(
    st.sampled_from(["qwen3_moe", "gpt_oss"]),
    st.sampled_from(SPLITS),
    st.sampled_from([100, 2**28]),
    routes,
)
def test_shared_products_give_what_composed_experts_give(
    family: str, split: tuple[tuple[str, ...], ...], working_bytes: int, index: list[list[int]]
) -> None:
    """Composed where gradients are wanted; indices of E stand for other devices' experts."""
    module = experts(family, split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank_module, "WORKING_BYTES", working_bytes)
        expected = module(*inputs(index)).detach()
        compositions = Compositions(module)
        with torch.no_grad():
            found = module(*inputs(index))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert compositions.count == 0


def test_it_rounds_about_as_much_as_composed_experts_do() -> None:
    index = [[token % E, (token + 1 + token // E) % E] for token in range(24)]
    low = experts(dtype=torch.bfloat16)
    exact = experts().double()
    exact.load_state_dict(low.state_dict())
    states, routed, weights = inputs(index, torch.bfloat16)
    expected = exact(states.double(), routed, weights.double()).detach()
    composed = (low(states, routed, weights).double() - expected).norm().item()
    with torch.no_grad():
        shared = (low(states, routed, weights).double() - expected).norm().item()
    assert 0 < shared < 2 * composed < 0.05 * expected.norm().item()


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_other_activations_are_composed(activation: str) -> None:
    module = experts(activation=activation)
    compositions = Compositions(module)
    with torch.no_grad():
        module(*inputs([[0, 1]]))
    assert compositions.count == 1


@pytest.mark.parametrize(("dtype", "weight"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_many_tokens_of_few_experts_are_composed(dtype: torch.dtype, weight: int) -> None:
    """At the crossing that the docstring of `globe.model.sharing` counts; composing is in float32."""
    module = experts(dtype=dtype)
    uses, layout, M, R = module.globe_uses, module.globe_layout, 6, 5
    most = 800
    for num_hit in (1, 3, E):
        cheaper = [
            tokens for tokens in range(num_hit, most) if is_cheaper(uses, layout, dtype, tokens, 2 * tokens, num_hit)
        ]
        shared, composed = 2 * M * R * D + 2 * 3 * (M + P) * R, 2 * 3 * P * D
        crossing = weight * num_hit * 3 * (M + P) * R * D / (shared - composed)
        assert cheaper == [tokens for tokens in range(num_hit, most) if tokens < crossing]
        assert 0 < len(cheaper) < most - num_hit
    compositions = Compositions(module)
    with torch.no_grad():
        module(*inputs([[0, 1]] * 300, dtype))
    assert compositions.count == 1


def test_a_layer_keeps_all_of_its_experts_or_none() -> None:
    size = 3 * P * D * 4
    model = nn.ModuleList([experts(), experts()])
    model.dtype = torch.float32  # pyright: ignore[reportArgumentType]
    cache = set_compose_cache(model, 2 * E * size - 1)
    compositions = [Compositions(module) for module in model]
    with torch.no_grad():
        for module in model:
            expected = experts()(*inputs([[0, 1]]))
            for _ in range(2):
                torch.testing.assert_close(module(*inputs([[0, 1]])), expected, rtol=1e-4, atol=1e-4)
    assert [found.count for found in compositions] == [1, 0]
    assert cache.resident_bytes == E * size
    assert (cache.hits, cache.misses) == (2, 6)


@given(st.integers(0, 200), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=4))
def test_layers_that_fit_come_first(num_bytes: int, sizes: list[tuple[int, int]]) -> None:
    left = num_bytes
    for share, (num_experts, size) in zip(split_whole(num_bytes, sizes), sizes, strict=True):
        assert share == (num_experts * size if num_experts * size <= left else 0)
        left -= share
