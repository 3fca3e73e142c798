"""Compressed models inside vLLM: what its `vllm.general_plugins` load.

vLLM's own loader fills everything but the factors, which each layer reads by name. They stay in memory as they are
stored, and the experts that a batch hits are run by the code that does so in transformers: coded ones by the operation
`globe::coded_product`, others composed. In expert parallelism a process reads and keeps what is stored of its own
experts, and vLLM adds up what the processes find. Written for vLLM 0.32; the interfaces used are not promised to stay.
"""

# vLLM is not among the dependencies:
# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.lora.utils import is_in_target_modules
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from globe.bank_shape import sides
from globe.checkpoint.quantized import QUANT_METHOD
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.errors import CheckpointError, UnsupportedModelError
from globe.model.bank_module import Bank, BankUse
from globe.model.bank_spec import BankSpec
from globe.model.coded_spec import CodedSpec, spec_of, stored_parts
from globe.model.expert_modules import ExpertsLayout
from globe.model.experts import factorise
from globe.model.names import BANKS, DENSE_PARAMETER, FactorNames, coded_parameter, is_factor
from globe.model.quantization_config import GlobeQuantizationConfig
from globe.quant.banked import BankedExperts
from globe.terms import Family

_VLLM_PARAMETER = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
"""vLLM's names of the dense parameters, which it lays out as transformers does."""


def register() -> None:
    """The entry point: make vLLM understand `"quant_method": "globe"`. May be called more than once."""
    register_quantization_config(QUANT_METHOD)(VllmGlobeConfig)
    if not hasattr(torch.ops.vllm, "globe_experts"):
        direct_register_custom_op("globe_experts", _run_experts, fake_impl=_outputs_like)


class VllmGlobeConfig(QuantizationConfig):
    """The `quantization_config` of config.json, as vLLM asks about it.

    Args:
        section: the section, understood.
    """

    def __init__(self, section: GlobeQuantizationConfig) -> None:
        super().__init__()
        self.section = section
        self.shared: dict[str, Bank] = {}
        """Banks of several layers that a layer already has; their owner is the first one built."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VllmGlobeConfig:
        """Parse the section; raises as `GlobeQuantizationConfig` does."""
        return cls(GlobeQuantizationConfig(**config))

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Keep the factors and the tripwire from vLLM's loader, which has no place for them."""
        compressed = self.section.compressed
        tripwire = FactorNames({layer: str(layer) for layer, _ in compressed}, base="").tripwire(compressed)
        layer, parameter = tripwire.split(".")
        ignored = (r"(^|\.)globe_", rf"(^|\.)layers\.{layer}\.(.+\.)?{parameter}$")
        return WeightsMapper(orig_to_new_regex={re.compile(pattern): None for pattern in ignored})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer: GloBE's for compressed experts, vLLM's own for everything else."""
        if isinstance(layer, RoutedExperts):
            number = extract_layer_index(prefix)
            is_compressed = any(layer == number for layer, _ in self.section.compressed)
            return (
                GlobeExpertsMethod(layer, self, number)
                if is_compressed
                else UnquantizedFusedMoEMethod(layer.moe_config)
            )
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class GlobeExpertsMethod(FusedMoEMethodBase):
    """Runs the routed experts of one layer from factors.

    Args:
        layer: the experts; `UnsupportedModelError` if they or the server's settings ask for what is not there.
        config: of the model.
        number: of the decoder layer.
    """

    def __init__(self, layer: RoutedExperts, config: VllmGlobeConfig, number: int) -> None:
        super().__init__(layer.moe_config)
        _refuse_unsupported(layer)
        model = get_current_vllm_config().model_config
        self._model, self._revision = model.model, model.revision
        self._config, self._number = config, number
        self._owned: dict[str, Bank] = {}

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer its factors, and dense parameters, for vLLM's loader, of families that are not compressed.

        `CheckpointError` names a factor that is missing, of another shape, or that does not fit the others.
        """
        layout = ExpertsLayout(
            num_experts,
            intermediate_size_per_partition,
            hidden_size,
            is_transposed=False,
            is_concatenated=True,
            has_bias=False,
        )
        here = _experts_here(layer)
        coded: dict[Family, BankedExperts] = {
            spec.family: self._coded(spec, (layer.global_num_experts, *sides(layout, spec.family)))[here]
            for spec in self._config.section.coded_of(self._number)
        }
        banks = self._config.section.banks_of(self._number)
        replaced = {
            DENSE_PARAMETER[family] for number, family in self._config.section.compressed if number == self._number
        }
        experts = _SwiGLUExperts()
        for name, shape in layout.dense_parameters.items():
            empty = torch.empty(0 if name in replaced else shape, dtype=params_dtype)
            parameter = nn.Parameter(empty, requires_grad=False)
            experts.register_parameter(name, parameter)
            if name not in replaced:
                layer.register_parameter(_VLLM_PARAMETER[name], parameter)
                set_weight_attrs(parameter, extra_weight_attrs)
        uses = [self._bank_use(bank, experts, layout) for bank in banks]
        factorise(experts, layout, uses, [spec_of(self._number, family, part) for family, part in coded.items()])
        self._fill(experts, coded, here, layer.global_num_experts)
        layer.add_module("globe_experts", experts.requires_grad_(False))
        layer.add_module(BANKS, nn.ModuleDict(self._owned).requires_grad_(False))

    def _bank_use(self, bank: BankSpec, experts: nn.Module, layout: ExpertsLayout) -> BankUse:
        shared = self._config.shared
        if bank.name in shared:
            return BankUse(shared[bank.name], bank.families, own=None)
        like = next(experts.parameters())
        module = Bank(
            bank.shape(layout).bases,
            self._config.section.activation,
            dtype=like.dtype,
            device=like.device,
        )
        if not bank.shared:
            return BankUse(module, bank.families, own=bank.name)
        shared[bank.name] = self._owned[bank.name] = module
        return BankUse(module, bank.families, own=None)

    def _coded(self, spec: CodedSpec, sizes: tuple[int, int, int]) -> BankedExperts:
        """A coded family of all experts, on the CPU: sizes (E, N, K)."""
        with torch.device("cpu"):  # vLLM makes layers on the device that they are for
            shapes = spec.shapes(sizes).items()
            parts = {part: self._read(coded_parameter(spec.family, part), shape) for part, (shape, _) in shapes}
            whole = spec.experts(parts, sizes[2])
            if not whole.is_sound():
                raise CheckpointError(
                    f"{self._model}, {spec.name}: rows and paths do not fit each other; "
                    "fetch the checkpoint again or repeat the compression"
                )
            return whole

    def _fill(self, experts: nn.Module, coded: dict[Family, BankedExperts], here: Tensor, num_experts: int) -> None:
        """Give the empty factors their values: those of the experts `here` (n,), of `num_experts` that are stored."""
        values = {
            coded_parameter(family, part): value
            for family, own in coded.items()
            for part, value in stored_parts(own).items()
        }
        for name, parameter in experts.named_parameters():
            if name in values:
                parameter.data.copy_(values[name])
            elif name.startswith(BANKS):
                parameter.data.copy_(self._read(name, tuple(parameter.shape)))
            elif is_factor(name):
                parameter.data.copy_(self._read(name, (num_experts, *parameter.shape[1:]))[here])
        for name, bank in self._owned.items():
            bank.bases.data.copy_(self._read(f"{BANKS}.{name}.bases", tuple(bank.bases.shape), shared=True))

    def _read(self, name: str, shape: tuple[int, ...], shared: bool = False) -> Tensor:
        """A factor of the layer, or one that layers share."""
        checkpoint, names = _factors(self._model, self._revision)
        place = None if shared else self._number, name
        stored = checkpoint.tensors[names[place]].shape if place in names else None
        if stored != shape:
            raise CheckpointError(
                f"{self._model}, layer {self._number}: expected {name} of shape {shape}, found {stored or 'none'}; "
                "fetch the checkpoint again or repeat the compression"
            )
        return checkpoint.read(names[place])

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:  # noqa: ARG002
        """None: no kernel of vLLM's runs these experts."""
        return

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,  # noqa: ARG002
        shared_experts_input: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """Weighted sum over each token's experts: (T, D), (T, K), (T, K) -> (T, D). vLLM's runner adds shared ones."""
        return torch.ops.vllm.globe_experts(x, topk_weights, topk_ids, layer.layer_name)


class _SwiGLUExperts(nn.Module):
    """What `factorise` makes experts of: the activation, and parameters put there by name."""

    act_fn = staticmethod(nn.functional.silu)


def _run_experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    """The custom op, which torch.compile does not look into: which experts are hit is read back to the host."""
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    if layer.expert_map is not None:
        own = layer.expert_map[topk_ids]
        topk_ids = own.where(own >= 0, layer.local_num_experts)
    return layer.globe_experts(x, topk_ids, topk_weights)


def _outputs_like(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


def _experts_here(layer: RoutedExperts) -> Tensor:
    """The numbers (n,) of the experts that are this process's, in its order."""
    if layer.expert_map is None:
        return torch.arange(layer.global_num_experts, device="cpu")
    return (layer.expert_map.cpu() >= 0).nonzero().flatten()


@functools.lru_cache(maxsize=1)
def _factors(model: str, revision: str | None) -> tuple[Checkpoint, dict[tuple[int | None, str], str]]:
    """The checkpoint, and its factors' names by layer (None for what layers share) and name inside the experts."""
    checkpoint = open_checkpoint(model, revision)
    names: dict[tuple[int | None, str], str] = {}
    for name in filter(is_factor, checkpoint.tensors):
        place, _, rest = name.partition("globe_")
        number = next((int(part) for part in place.split(".") if part.isdigit()), None)
        names[number, f"globe_{rest}"] = name
    return checkpoint, names


def _refuse_unsupported(layer: RoutedExperts) -> None:
    moe, parallel = layer.moe_config, layer.moe_config.moe_parallel_config
    eager = current_platform.is_cpu() or get_current_vllm_config().model_config.enforce_eager
    problems = {
        "parts of an expert in several processes (give --enable-expert-parallel)": parallel.tp_size > 1,
        "data or context parallelism": max(parallel.dp_size, parallel.pcp_size) > 1,
        "CUDA graphs (give --enforce-eager)": not eager,
        "experts with biases": moe.has_bias,
        f"the activation {moe.activation.value}": moe.activation is not MoEActivation.SILU,
        "a limit or slope in the gate": (moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta) != (None, None, None),
        "router weights applied to the input": layer.apply_router_weight_on_input,
        "LoRA on experts (give --lora-target-modules of the attention)": moe.is_lora_enabled
        and is_in_target_modules(layer.layer_name, get_current_vllm_config().lora_config.target_modules),
        "redundant experts": moe.num_experts != moe.num_logical_experts,
    }
    if unsupported := [problem for problem, is_there in problems.items() if is_there]:
        raise UnsupportedModelError(
            f"{layer.layer_name}: GloBE's experts in vLLM do not support {', '.join(unsupported)}; "
            "change that, or serve what `globe export` writes, which needs no plugin"
        )
