"""How transformers loads and saves a compressed model: the hooks of its quantiser interface."""

# transformers' base class is not annotated:
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer

from globe.checkpoint.manifest import MANIFEST
from globe.checkpoint.reader import open_checkpoint
from globe.errors import CheckpointError, SettingsError
from globe.model.autoload import save_with_autoload, save_without_autoload, write_autoload
from globe.model.bank_module import Bank, BankUse
from globe.model.bank_spec import BankSpec
from globe.model.dequantize import restore_dense
from globe.model.expert_modules import RoutedExperts, factor_names, find_experts
from globe.model.experts import GlobeExperts, factorise
from globe.model.factor_check import (
    RUN_METADATA,
    check_coded,
    check_factors_in_files,
    check_factors_loaded,
    check_finite_factors,
    check_run,
)
from globe.model.names import BANKS, DENSE_PARAMETER, TRIPWIRE_SHAPE, is_factor
from globe.model.quantization_config import CompressingConfig, GlobeQuantizationConfig, read_section
from globe.typed import shown

_FACTOR_STYLES = {"moe_tp_experts": "colwise", "ep_dispatch_experts": "grouped_gemm"}
"""How to shard (E, P, …) factors where the plan has the experts: their P for tensor, their E for expert parallelism."""


class GlobeQuantizer(HfQuantizer):
    """Gives a model on the meta device factorised experts before its weights load, and guards what is loaded.

    A dense model is compressed first where it is loaded with a `CompressingConfig`: between building the model and
    loading its weights, the files to load become those of the output. One instance serves one model.
    """

    quantization_config: GlobeQuantizationConfig

    def __init__(self, quantization_config: GlobeQuantizationConfig | CompressingConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._compressing = quantization_config if isinstance(quantization_config, CompressingConfig) else None
        if self._compressing is None and not self.pre_quantized:
            raise SettingsError(
                "a dense model is compressed while loading by globe.GlobeConfig; or load what `globe compress` wrote"
            )
        self._was_dense = not self.pre_quantized
        self._loading = contextlib.ExitStack()  # closed when weights are loaded
        self._files: list[str] = []
        self._tripwire = ""
        self.save_directory: Path | None = None  # of the save under way, where this process writes

    def update_device_map(self, device_map: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        if self._compressing is not None and (isinstance(device_map, str) or len(set((device_map or {}).values())) > 1):
            raise SettingsError(
                f"device_map {shown(device_map)} may spread a model that is compressed while it loads over several "
                "places: name one, or give the output's folder to from_pretrained with this device_map"
            )
        return device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if self._compressing is not None:  # when the model is built: until then tensors are made on the meta device
            self._files = checkpoint_files or []
            return model
        experts = {found.layer: found for found in find_experts(model)}
        config = self.quantization_config
        named = [(f"bank {bank.name}", bank.layers) for bank in config.banks]
        for name, layers in [*named, *((spec.name, (spec.layer,)) for spec in config.coded)]:
            if unknown := set(layers) - experts.keys():
                raise CheckpointError(
                    f"config.json has {name} for layers {sorted(unknown)}, "
                    f"but {type(model).__name__} has routed experts in layers {sorted(experts)} only"
                )
        names = factor_names(model)
        self._tripwire = names.tripwire(config.compressed)
        # without the base model's path, which the file may have or lack: a base model also loads from the checkpoint of
        # a model with a head, and the other way round
        ending = re.escape(self._tripwire.removeprefix(f"{names.base}."))
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            rf"(^|\.){ending}$",
        }
        shared = {bank.name: self._empty_bank(bank, experts) for bank in config.banks if bank.shared}
        if shared:
            model.base_model.add_module(BANKS, nn.ModuleDict(shared))
        for layer, routed in experts.items():
            uses = [
                BankUse(shared[bank.name], bank.families, own=None)
                if bank.shared
                else BankUse(self._empty_bank(bank, experts), bank.families, own=bank.name)
                for bank in config.banks
                if layer in bank.layers
            ]
            if uses or config.coded_of(layer):
                factorise(routed.module, routed.layout, uses, config.coded_of(layer))
        save_with_autoload(model)
        self._files = [file for file in checkpoint_files or [] if file.endswith(".safetensors")]
        return model

    def _empty_bank(self, bank: BankSpec, experts: Mapping[int, RoutedExperts]) -> Bank:
        first = experts[bank.layers[0]]
        like = next(first.module.parameters(recurse=False))
        return Bank(
            bank.shape(first.layout).bases,
            self.quantization_config.activation,
            dtype=like.dtype,
            device=like.device,
        )

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Called last before weights load: all that can be checked is known."""
        if self._compressing is not None:
            self._compress_first(self._compressing, model)
        if self._files:
            check_run(self._files, self.quantization_config.run)
            check_factors_in_files(model, self._files, weight_conversions)
        # The family's rule that splits gate_up_proj on saving must not meet the tripwire. On saving, rules are tried
        # from the last to the first, and only those that matched on loading.
        keep_tripwire = WeightConverter(self._tripwire, self._tripwire, [_Keep()])
        keep_tripwire.rename_source_key(self._tripwire)
        return [*super().update_weight_conversions(weight_conversions, model), keep_tripwire]

    def _compress_first(self, config: CompressingConfig, model: PreTrainedModel) -> None:
        """Put the compressed model in the place of the dense one, in the list of files that is then loaded."""
        files = self._files
        if not files or not files[0].endswith(".safetensors"):
            raise SettingsError("a model is compressed while it loads from its folder or Hub id, in safetensors alone")
        checkpoint = open_checkpoint(self._loading.enter_context(config.compressed(Path(files[0]).parent)))
        files[:] = [str(checkpoint.shard_path(shard)) for shard in checkpoint.shards]
        self.quantization_config, self._compressing, self.pre_quantized = read_section(checkpoint), None, True
        model.config.quantization_config = self.quantization_config
        self.preprocess_model(model, checkpoint_files=files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self._loading.close()
        if self._was_dense or not self._files:
            check_factors_loaded(model)
        check_finite_factors(model)
        check_coded(model)
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Shard adapters like the rows of the matrices they make; bases, and codes but for experts, are replicated."""
        parameters = {_any_layer(name): parameter for name, parameter in model.named_parameters()}
        paths = {_any_layer(path) for path, module in model.named_modules() if _is_globe(module)}
        for path in paths:
            for dense in set(DENSE_PARAMETER.values()):
                if f"{path}.{dense}" not in parameters:
                    plan.pop(f"{path}.{dense}", None)
            if style := _FACTOR_STYLES.get(plan.get(path, "")):
                for name, parameter in parameters.items():
                    owner, _, leaf = name.rpartition(".")
                    if owner == path and is_factor(leaf) and (parameter.dim() == 3 or style == "grouped_gemm"):
                        plan[name] = style

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the model's tensors and the tripwire, and the autoload file beside them."""
        if self.save_directory is not None and not getattr(model, "_hf_peft_config_loaded", False):
            write_autoload(self.save_directory)
            (self.save_directory / MANIFEST).unlink(missing_ok=True)  # of what the folder held before
        run = self.quantization_config.run
        metadata = {} if run is None else {RUN_METADATA: run}
        return {**model.state_dict(), self._tripwire: torch.zeros(TRIPWIRE_SHAPE, dtype=model.dtype)}, metadata

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        restore_dense(model)
        save_without_autoload(model)
        nn.Module.to(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)  # a saved config has a name
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # at least what is not factors, or adapters beside them

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the factors are ordinary parameters, so that training needs no adapters beside them."""
        return not self.quantization_config.coded

    @property
    def is_compileable(self) -> bool:
        return False  # generate() would compile by itself into CUDA graphs, which the experts' forward breaks up


class _Keep(ConversionOps):
    """The conversion that changes nothing, in both directions."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def _any_layer(name: str) -> str:
    """The name with wildcards for numbers, as parallel plans have it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _is_globe(module: nn.Module) -> bool:
    return isinstance(module, GlobeExperts)
