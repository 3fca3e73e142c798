from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from globe import CheckpointError
from globe.checkpoint.reader import open_checkpoint

WriteCheckpoint = Callable[..., Path]


@pytest.mark.parametrize(
    "entries",
    [
        {"transformers_weights": "other.safetensors"},
        {"transformers_weights": "../../other.safetensors.index.json"},
        {"configuration_files": ["config.4.0.0.json"]},
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "owner/kernel@v1:function"},
        {"_attn_implementation_internal": "paged|owner/kernel"},
        {"attn_implementation": {"": "eager", "vision_config": "owner/kernel"}},
        {"attn_implementation": {"text_config": {"": "owner/kernel"}}},
        {"experts_implementation": "owner/kernel"},
        {"text_config": {"_attn_implementation": "owner/kernel"}},
        {"thinker_config": {"text_config": {"experts_implementation": "owner/kernel"}}},
        {"sub_configs": [{"transformers_weights": "x.safetensors"}]},
        {"vision_config": {"architecture": "hf-hub:owner/model"}},
        {"vision_config": {"backbone": "local-dir:/elsewhere"}},
    ],
)
def test_entries_that_redirect_are_refused_by_name(write_checkpoint: WriteCheckpoint, entries: dict[str, Any]) -> None:
    folder = write_checkpoint({"model.safetensors": {"a": torch.ones(2)}}, {"model_type": "m", **entries})
    with pytest.raises(CheckpointError, match="take the entry out") as caught:
        open_checkpoint(folder)
    (key,) = entries
    assert key in str(caught.value)


def test_what_is_installed_or_never_run_passes(write_checkpoint: WriteCheckpoint) -> None:
    config = {
        "model_type": "m",
        "_name_or_path": "/home/someone/model",
        "transformers_weights": None,
        "attn_implementation": "sdpa",
        "_attn_implementation": "flash_attention_2",
        "experts_implementation": {"": "grouped_mm"},
        "auto_map": {"AutoConfig": "owner/name--configuration_x.X"},
        "vision_config": {"architecture": "vit_base_patch16"},
    }
    folder = write_checkpoint({"model.safetensors": {"a": torch.ones(2)}}, config)
    assert open_checkpoint(folder).config == json.loads((folder / "config.json").read_text())


def test_weights_that_come_before_the_others_are_refused(write_checkpoint: WriteCheckpoint) -> None:
    folder = write_checkpoint({"model.safetensors": {"a": torch.ones(2)}}, {"model_type": "m"})
    (folder / "shard-00001-model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match="weights of a distributed training"):
        open_checkpoint(folder)
