"""Compressed models inside transformers.

Importing this package registers the quantisation method "globe", so that `AutoModelForCausalLM.from_pretrained` loads a
compressed checkpoint.
"""

from __future__ import annotations

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer

from globe.model.bank_spec import BankSpec
from globe.model.compose_cache import ComposeCache
from globe.model.expert_modules import ExpertsLayout, RoutedExperts, experts_layout, factor_names, find_experts
from globe.model.names import FactorNames, dense_halves, tripwire_tensor
from globe.model.quantization_config import FORMAT_VERSION, QUANT_METHOD, GlobeQuantizationConfig
from globe.model.quantizer import GlobeQuantizer
from globe.model.serving import set_compose_cache

if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(GlobeQuantizationConfig)
    register_quantizer(QUANT_METHOD)(GlobeQuantizer)

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "BankSpec",
    "ComposeCache",
    "ExpertsLayout",
    "FactorNames",
    "GlobeQuantizationConfig",
    "GlobeQuantizer",
    "RoutedExperts",
    "dense_halves",
    "experts_layout",
    "factor_names",
    "find_experts",
    "set_compose_cache",
    "tripwire_tensor",
]
