"""What large models take to be compressed, on this machine and, by arithmetic, on others.

    python -m benchmarks.costs

A checkpoint of each model is imitated: its configuration, and the headers of its files, which hold nothing. `inspect`
then says what it says of the real one: bytes, memory, and hours on this machine, of which it does every part for a
moment. Hours on another machine are those, as many times shorter as its products are faster (measuring, fits) or its
cores are more (coding: by threads and processes, of which two were measured to be 1.8 times as fast as one), or, if
that is more, what it takes to read the model as often as it is read. Those are estimates; the machines' speeds are
below.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.record import RESULTS, write_record
from benchmarks.tables import Column, print_table
from globe import CompressConfig, inspect
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.checkpoint.writer import copy_side_files
from globe.machine.device import multiply_add_rate
from globe.measure import runnable
from globe.run import outlook

COLUMNS = (
    Column("model", "model"),
    Column("machine", "machine"),
    Column("read", "source, GB", ".0f"),
    Column("written", "3 bits, GB", ".0f"),
    Column("memory", "memory, GB", ".0f"),
    Column("measuring", "measuring, h", ".1f"),
    Column("coding", "coding, h", ".1f"),
    Column("fitting", "fits, h", ".0f"),
    Column("generated", "tokens/s at most", ".0f"),
)
READ = 7
"""Times that all weights are read: forward and backward to measure, three to plan, to code and make up for what was
coded, and for what stays as it is."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a machine is taken to have."""

    memory: float
    """GB for the model that is measured, of the CPU."""
    cores: int
    rate: float | None
    """Products in float32, 10¹² multiply-adds a second; None: of this machine."""
    disk: float
    """GB read from disk in a second."""
    bandwidth: float
    """GB read in a second from the memory that the coded model is served from."""


MACHINES = {
    "this one, a thread": Machine(24, 1, None, 1.0, 20),
    "16 cores, 64 GB, a GPU": Machine(64, 16, 10, 3.0, 80),
    "96 cores, 2 TB, 8 H100": Machine(2000, 96, 15, 6.0, 3350),
}
"""Half of the GPUs' peak rates in float32 (a GPU of 40 TFLOP/s; 60). Coding runs on the cores, and one GPU measures."""

QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}
GLM_AIR = {
    "model_type": "glm4_moe",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "vocab_size": 151552,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": QWEN3,
    "GLM-4.5-Air": GLM_AIR,
    "DeepSeek-V3": DEEPSEEK,
    "Kimi-K2": DEEPSEEK
    | {
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "first_k_dense_replace": 1,
        "vocab_size": 163840,
        "n_group": 1,
        "topk_group": 1,
    },
}
BLOCK = 128
"""Rows and columns that share a scale in FP8."""


@dataclasses.dataclass(frozen=True)
class CostsConfig:
    """What is asked."""

    models: tuple[str, ...] = tuple(MODELS)
    """Which models."""
    bits: float = 3
    """Stored bits per weight of the experts."""
    keep: float = 0.75
    """Share of the parameters that fits keep."""
    output: Path = RESULTS / "costs.json"
    """Where the record is written."""


def imitate(folder: Path, settings: dict[str, Any]) -> tuple[int, int]:
    """Write the configuration and the headers of a model's files, which are as long as those.

    Returns how many weights a token goes through: of experts, and others.
    """
    config = AutoConfig.for_model(tie_word_embeddings=False, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    is_fp8 = settings["model_type"] == "deepseek_v3"
    shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}

    def add(layer: str, name: str, *shape: int) -> None:
        is_coarse = is_fp8 and len(shape) == 2 and ".layers." in name and not name.endswith("mlp.gate.weight")
        shard = shards.setdefault(layer, {})
        shard[name] = ("F8_E4M3" if is_coarse else "BF16", shape)
        if is_coarse:
            shard[f"{name}_scale_inv"] = ("F32", tuple(math.ceil(size / BLOCK) for size in shape))

    experts = others = 0
    for name, tensor in model.state_dict().items():
        prefix, is_expert, _ = name.partition(".mlp.experts.")
        layer = prefix.split(".layers.")[1].split(".")[0] if ".layers." in name else "other"
        if not is_expert:
            add(layer, name, *tensor.shape)
            others += 0 if "embed" in name else tensor.numel()
        elif name.endswith("down_proj"):
            E, D, P = tensor.shape
            experts += 3 * settings["num_experts_per_tok"] * D * P
            for expert in range(E):
                for projection, shape in (("gate", (P, D)), ("up", (P, D)), ("down", (D, P))):
                    add(layer, f"{prefix}.mlp.experts.{expert}.{projection}_proj.weight", *shape)
    weight_map = {}
    for layer, shard in shards.items():
        path, end, header = folder / f"model-{layer}.safetensors", 0, {}
        for name, (dtype, shape) in shard.items():
            size = math.prod(shape) * {"BF16": 2, "F8_E4M3": 1, "F32": 4}[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + size)}
            end += size
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with path.open("r+b") as file:
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    written = config.to_dict() | {"architectures": [type(model).__name__]}
    if is_fp8:
        written["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    copy_side_files(open_checkpoint(resolve_model("shipped")), folder)
    (folder / "config.json").write_text(json.dumps(written))
    return experts, others


def rows_of(name: str, config: CostsConfig) -> list[dict[str, Any]]:
    """What the model takes, on every machine."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        experts, others = imitate(folder, MODELS[name])
        read = experts * config.bits / 8 + others * (1 if MODELS[name]["model_type"] == "deepseek_v3" else 2)
        for where, machine in MACHINES.items():
            total = int(machine.memory * 1e9), where
            with (
                mock.patch.object(runnable, "total_memory", return_value=total),
                mock.patch.object(outlook, "total_memory", return_value=total),
            ):
                coded = inspect(folder, CompressConfig(bits=config.bits))
                fitted = inspect(folder, CompressConfig(keep=config.keep, calibrate="none", allocation="uniform"))
            rate = multiply_add_rate("cpu")
            slower = 1 if machine.rate is None else rate / (1e12 * machine.rate)
            reading = coded.read / (1e9 * machine.disk)
            rows.append(
                {
                    "model": name,
                    "machine": where,
                    "read": coded.read / 1e9,
                    "written": coded.written / 1e9,
                    "memory": coded.memory / 1e9,
                    "measuring": max(coded.foreseen.measuring * slower, 2 * reading) / 3600
                    if coded.unmeasured_because is None
                    else None,
                    "coding": max(coded.foreseen.working / machine.cores, (READ - 2) * reading) / 3600,
                    "fitting": fitted.seconds * slower / 3600,
                    "generated": 1e9 * machine.bandwidth / read,
                    "unmeasured_because": coded.unmeasured_because,
                }
            )
    return rows


def main(config: CostsConfig) -> None:
    """Print the table, write the record."""
    rows = [row for name in config.models for row in rows_of(name, config)]
    print_table("What large models take", rows, COLUMNS)
    write_record(config.output, "costs", config, rows, [])


if __name__ == "__main__":
    main(tyro.cli(CostsConfig, description=__doc__))
