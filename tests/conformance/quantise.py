"""Quantised tiny checkpoints, as DeepSeek-V3 (block FP8), gpt-oss (MXFP4) and Kimi-K2 (packed int4) are released.

Written from the formats' descriptions, one number at a time where that is what they say, and without GloBE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conformance.tiny import tiny_model

BLOCK = 8
GROUP = 8
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "actorder": None,
            },
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*"],
}


def block_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks scaled to FP8's range: (N, K) -> float8 (N, K), float32 (⌈N/8⌉, ⌈K/8⌉)."""
    numbers, scales = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn), []
    for top in range(0, matrix.shape[0], BLOCK):
        for left in range(0, matrix.shape[1], BLOCK):
            part = slice(top, top + BLOCK), slice(left, left + BLOCK)
            scales.append(matrix[part].float().abs().max() / 448)
            numbers[part] = (matrix[part].float() / scales[-1]).to(torch.float8_e4m3fn)
    return numbers, torch.stack(scales).view(-(-matrix.shape[0] // BLOCK), -(-matrix.shape[1] // BLOCK))


def mxfp4(experts: Tensor) -> tuple[Tensor, Tensor]:
    """gpt-oss' experts (E, K, N) -> bytes (E, N, K/32, 16) and exponents (E, N, K/32)."""
    runs = experts.float().transpose(1, 2).unflatten(2, (-1, 32))
    exponents = runs.abs().amax(-1).log2().floor() - 2
    scaled = runs / exponents.exp2().unsqueeze(-1)
    magnitude = (scaled.abs().unsqueeze(-1) - torch.tensor(E2M1)).abs().argmin(-1)
    nibbles = (magnitude + 8 * (scaled < 0)).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def packed_int4(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K) -> int32 (N, K/8), bfloat16 scales (N, K/8), and what they stand for, bfloat16 (N, K)."""
    runs = matrix.float().unflatten(1, (-1, GROUP))
    scales = (runs.abs().amax(-1) / 7).bfloat16()
    numbers = (runs / scales.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(1)
    words = [
        [sum((int(number) + 8) << (4 * place) for place, number in enumerate(row[start : start + 8])) for start in
         range(0, len(row), 8)]
        for row in numbers.tolist()
    ]  # fmt: skip
    signed = torch.tensor(words, dtype=torch.int64)
    signed = torch.where(signed >= 2**31, signed - 2**32, signed).to(torch.int32)
    meant = (numbers.unflatten(1, (-1, GROUP)) * scales.float().unsqueeze(-1)).flatten(1).bfloat16()
    return signed, scales, meant


def write_quantised(method: str, folder: Path) -> dict[str, Tensor]:
    """Write the checkpoint, its scales in a shard of their own; returns what the plain tensors are, where known."""
    family = {"fp8": "deepseek_v3", "mxfp4": "gpt_oss", "int4": "deepseek_v3"}[method]
    model = tiny_model(family, torch.bfloat16, **({"intermediate_size": 32} if method == "mxfp4" else {}))
    model.save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    numbers, scales = dict(plain), dict[str, Tensor]()
    for name, tensor in plain.items():
        if method == "fp8" and name.endswith("proj.weight"):
            numbers[name], scales[f"{name}_scale_inv"] = block_fp8(tensor)
        elif method == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            del numbers[name]
            numbers[f"{name}_blocks"], scales[f"{name}_scales"] = mxfp4(tensor)
        elif method == "int4" and ".experts." in name:
            del numbers[name]
            numbers[f"{name}_packed"], scales[f"{name}_scale"], plain[name] = packed_int4(tensor)
            scales[f"{name}_shape"] = torch.tensor(tensor.shape)
    middle = len(numbers) // 2
    parts = (dict(list(numbers.items())[:middle]), dict(list(numbers.items())[middle:]), scales)
    write_shards(folder, parts)
    change_config(folder, {"fp8": FP8, "mxfp4": MXFP4, "int4": INT4}[method])
    if method == "int4":
        (folder / "modeling.py").write_text("raise SystemExit('remote code was run')")
        change_config(folder, INT4, model_type="kimi_k2", auto_map={"AutoConfig": "modeling.KimiK2Config"})
    return plain


def write_shards(folder: Path, parts: tuple[Mapping[str, Tensor], ...]) -> None:
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in part.items()}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_config(folder: Path, section: Mapping[str, Any], **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes, "quantization_config": section}))
