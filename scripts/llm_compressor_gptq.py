"""Round the experts of a mixture by llm-compressor's GPTQ, as its users do, on the tokens that GloBE was calibrated on.

    globe compress shipped -o packed --format compressed-tensors --save-statistics statistics.safetensors
    pip install llmcompressor==0.14.0.1
    python scripts/llm_compressor_gptq.py --source globe/data/pystdlib-moe --statistics statistics.safetensors \\
        --group 16 --output runs/llm-compressor
    globe evaluate packed --reference shipped; globe evaluate runs/llm-compressor --reference shipped

It needs an environment of its own (an older transformers), so nothing of GloBE is imported here. What is written is
compressed-tensors, as GloBE writes it: the same groups and bits, and so the same bytes. All settings but the group are
llm-compressor's own defaults, every expert is given all tokens of its layer, and the rest of the model stays as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="mixture in the format of transformers")
    parser.add_argument("--statistics", type=Path, required=True, help="what globe compress --save-statistics wrote")
    parser.add_argument("--output", type=Path, required=True, help="directory that receives it rounded")
    parser.add_argument("--bits", type=int, default=4, help="bits of a weight")
    parser.add_argument("--group", type=int, default=128, help="weights that share a scale")
    return parser.parse_args()


def main() -> None:
    asked = settings()
    torch.set_num_threads(1)
    with safe_open(asked.statistics, framework="pt") as file:
        windows = file.get_tensor("windows").tolist()
    rows: dict[str, Any] = {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(asked.source, dtype="auto"))
    weights = QuantizationArgs(num_bits=asked.bits, symmetric=True, strategy="group", group_size=asked.group)
    scheme = QuantizationScheme(targets=[r"re:.*experts\.\d+\..*proj$", r"re:.*experts\.\d+\.w\d$"], weights=weights)
    began = time.monotonic()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(config_groups={"group_0": scheme}),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        processor=AutoTokenizer.from_pretrained(asked.source),
    )
    print(json.dumps({"seconds": time.monotonic() - began}))
    model.save_pretrained(asked.output, save_compressed=True)
    AutoTokenizer.from_pretrained(asked.source).save_pretrained(asked.output)
    if model.config.model_type == "mixtral":
        rename(asked.output / "model.safetensors")


def rename(path: Path) -> None:
    """Give a Mixtral's matrices the names that transformers loads, which a model made linear in memory has lost."""
    tensors = load_file(path)
    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        tensors = {name.replace(f".{ours}.", f".{theirs}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
