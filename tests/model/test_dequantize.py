from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from globe.errors import UnsupportedModelError
from tests.model.compressed import FAMILY_SETTINGS, logits
from tests.model.conftest import Make
from tests.rounding import assert_equal_but_for_rounding


@pytest.mark.parametrize("banks", ["shared_and_own", "middle_layer"])
@pytest.mark.parametrize("model_type", FAMILY_SETTINGS)
def test_dense_again(compressed: Make, tmp_path: Path, model_type: str, banks: str) -> None:
    """In memory, and in what is then saved: the source's tensor names, which stock transformers reads."""
    made = compressed(model_type, banks)
    model = AutoModelForCausalLM.from_pretrained(made.path)
    expected = logits(model)
    model.dequantize()
    assert type(model.model.layers[1].mlp.experts) is type(made.dense.model.layers[1].mlp.experts)
    assert model.state_dict().keys() == made.dense.state_dict().keys()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(made.source / "model.safetensors").keys()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_equal_but_for_rounding(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_an_offloaded_model_is_refused(compressed: Make, tmp_path: Path) -> None:
    path = compressed("olmoe").path
    model = AutoModelForCausalLM.from_pretrained(path, device_map={"": "disk"}, offload_folder=tmp_path)
    with pytest.raises(UnsupportedModelError, match="offloaded or sharded"):
        model.dequantize()
