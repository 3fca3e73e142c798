"""Checkpoints of a few kilobytes, written as their files are, without transformers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "tiny_moe", "num_hidden_layers": 2, "num_experts": 3}


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`write({shard: {name: tensor}}, config)`: a folder with an index unless the one shard is model.safetensors."""

    def write(shards: Mapping[str, Mapping[str, Tensor]], config: Any = CONFIG, name: str = "source") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for shard, tensors in shards.items():
            save_file(dict(tensors), folder / shard, metadata={"format": "pt"})
        if list(shards) != ["model.safetensors"]:
            weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


@pytest.fixture
def expert_tensors() -> Callable[..., dict[str, Tensor]]:
    """`make(layout, prefix)`: random experts of one layer, E = 3, P = 2, D = 4, under the names of the layout."""

    def make(layout: str, prefix: str = "model.layers.0.mlp.experts", dtype: torch.dtype = torch.float32) -> Any:
        gate, up, down = (torch.randn(shape).to(dtype) for shape in ((3, 2, 4), (3, 2, 4), (3, 4, 2)))
        if layout == "fused":
            return {f"{prefix}.gate_up_proj": torch.cat([gate, up], 1), f"{prefix}.down_proj": down}
        names = {"plain": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}[layout]
        return {
            f"{prefix}.{expert}.{name}.weight": stack[expert].clone()
            for name, stack in zip(names, (gate, up, down), strict=True)
            for expert in range(3)
        }

    return make


@pytest.fixture
def write_raw() -> Callable[[Path, Any, bytes], Path]:
    """`write(path, header, data)`: a safetensors file with any header, an object or its bytes, true or not."""

    def write(path: Path, header: Any, data: bytes) -> Path:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
        return path

    return write
