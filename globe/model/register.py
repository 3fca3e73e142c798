"""Importing this registers the quantisation method "globe", so that `AutoModelForCausalLM.from_pretrained` loads a
compressed checkpoint."""

from __future__ import annotations

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer

from globe.checkpoint.quantized import QUANT_METHOD
from globe.model.quantization_config import GlobeQuantizationConfig
from globe.model.quantizer import GlobeQuantizer

if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(GlobeQuantizationConfig)
    register_quantizer(QUANT_METHOD)(GlobeQuantizer)
