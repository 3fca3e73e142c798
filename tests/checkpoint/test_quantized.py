from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from globe.checkpoint.quantized import refuse_quantized
from globe.checkpoint.reader import open_checkpoint
from globe.errors import UnsupportedModelError

Write = Callable[..., Path]
PLAIN = {"model.safetensors": {"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 4)}}


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_source_is_refused_by_the_name_of_its_method(
    write_checkpoint: Write, method: str, nested: bool
) -> None:
    config: dict[str, Any] = {"quantization_config": {"quant_method": method}}
    folder = write_checkpoint(PLAIN, {"text_config": config} if nested else config)
    with pytest.raises(UnsupportedModelError, match=rf"is quantised \({method}, .* unquantised release"):
        refuse_quantized(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "globe"}}, "already compressed by GloBE: evaluate or export it"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "by a method it does not name"),
        ({"quantization_config": "int4"}, "'int4'"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_other_ways_to_say_so(write_checkpoint: Write, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        refuse_quantized(open_checkpoint(write_checkpoint(PLAIN, config)))


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.int32, "I32")]
)
def test_packed_experts_are_refused_without_a_configuration(
    write_checkpoint: Write, dtype: torch.dtype, name: str
) -> None:
    tensors = {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 4).to(dtype)}
    with pytest.raises(UnsupportedModelError, match=rf"1 expert tensors .*gate_up_proj_blocks \({name}\)"):
        refuse_quantized(open_checkpoint(write_checkpoint({"model.safetensors": tensors})))


def test_plain_weights_pass_whatever_lies_beside_the_experts(write_checkpoint: Write) -> None:
    tensors = PLAIN["model.safetensors"] | {"model.layers.0.positions": torch.zeros(2, dtype=torch.int64)}
    refuse_quantized(open_checkpoint(write_checkpoint({"model.safetensors": tensors}, {"quantization_config": None})))
