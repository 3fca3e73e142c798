"""Round the MLPs of a dense model by AutoRound, as its users do, on the text that GloBE is calibrated on.

    pip install auto-round; python scripts/autoround_dense.py --source runs/smollm2 --output runs/rounded --bits 3

AutoRound (Cheng et al. 2024, arXiv 2309.05516) learns by signed gradient descent, block after block, which way each
weight is rounded, so that the block's outputs change least. It needs an environment of its own, so nothing of GloBE is
imported here. What is written is the dense model with the weights that the rounded ones stand for, in float32, and
rounded.json: method, bits of a weight with scale (16 bits) and zero point of its group, and the seconds that it took.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

CALIBRATION = Path(__file__).parents[1] / "benchmarks" / "python_library.txt"
FULL_BITS = 16


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="dense model in the format of transformers")
    parser.add_argument("--output", type=Path, required=True, help="directory that receives it rounded")
    parser.add_argument("--bits", type=int, required=True, help="bits of a weight")
    parser.add_argument("--group", type=int, default=64, help="weights that share scale and zero point")
    parser.add_argument("--layers", type=int, nargs="*", help="layers whose MLPs are rounded; all by default")
    parser.add_argument("--iterations", type=int, default=200, help="steps for each block, AutoRound's default")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the calibration split")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    return parser.parse_args()


def calibration_data(tokenizer: Any, tokens: int, length: int) -> torch.utils.data.DataLoader[Any]:
    text = CALIBRATION.read_text(encoding="utf-8")[: 16 * tokens]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: tokens // length * length])
    windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.view(-1, length)]
    return torch.utils.data.DataLoader(windows, batch_size=1)  # type: ignore[arg-type]


def main() -> None:
    asked = settings()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(asked.source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(asked.source)
    data = calibration_data(tokenizer, asked.tokens, asked.length)
    layers = range(model.config.num_hidden_layers) if asked.layers is None else asked.layers
    rounded = {f"model.layers.{layer}.mlp.{family}_proj" for layer in layers for family in ("gate", "up", "down")}
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    began = time.monotonic()
    found, _ = AutoRound(
        model,
        tokenizer,
        scheme={"bits": asked.bits, "group_size": asked.group, "sym": False, "data_type": "int"},
        layer_config={name: {"bits": FULL_BITS} for name in linear if name not in rounded},
        dataset=data,
        iters=asked.iterations,
        seqlen=asked.length,
        nsamples=len(data),
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
    ).quantize()
    seconds = time.monotonic() - began
    found.float().save_pretrained(asked.output)
    tokenizer.save_pretrained(asked.output)
    record = {
        "method": "AutoRound",
        "bits": asked.bits + (16 + asked.bits) / asked.group,
        "shape": f"int{asked.bits}, groups of {asked.group}",
        "seconds": seconds,
    }
    (asked.output / "rounded.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
