"""Train the small Qwen2-MoE that ships with GloBE, on the sources of the Python standard library.

    python scripts/train_shipped_model.py --output runs/shipped

The files are split by a hash of their name into train, calibration and held-out. The result is a Hugging Face
directory in bfloat16 (weights, tokenizer, model card) beside the two texts that are not trained on.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import hashlib
import json
import math
import platform
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

END_OF_TEXT = "<|endoftext|>"
SKIPPED_FOLDERS = {"site-packages", "encodings", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the shipped model is trained."""

    output: Path
    """Directory that receives the model."""
    steps: int = 3600
    """Steps of AdamW; about an hour on two cores."""
    batch: int = 8
    """Sequences in a step."""
    length: int = 256
    """Tokens in a sequence."""
    learning_rate: float = 4e-3
    """Peak step size of AdamW."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices."""
    seed: int = 0
    """Seeds the initial weights and the order of the batches."""


def split_of(name: str) -> str:
    """`train`, `calibration` or `heldout`: a function of the file's name alone."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "calibration" if bucket < 3 else "heldout" if bucket < 7 else "train"


def standard_library() -> dict[str, list[str]]:
    """Texts per split: the sources of the running interpreter's standard library, documentation included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[str]] = {"train": [], "calibration": [], "heldout": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts) and path.stat().st_size > 200:
            try:
                texts[split_of(name)].append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:  # sources in other encodings are test data, not text
                continue
    return texts


def sorted_experts(
    experts: torch.nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts of one layer over tokens sorted by expert: a fifth faster to train on a CPU than the eager loop."""
    order = top_k_index.flatten().argsort(stable=True)
    token = order // top_k_index.shape[1]
    counts = top_k_index.flatten().bincount(minlength=experts.num_experts).tolist()
    outputs: list[torch.Tensor] = []
    rows = hidden[token].split(counts)
    for x, gate_up, down in zip(rows, experts.gate_up_proj.unbind(), experts.down_proj.unbind(), strict=True):
        gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
        outputs.append(functional.linear(functional.silu(gate) * up, down))
    weighted = torch.cat(outputs) * top_k_weights.flatten()[order][:, None]
    return torch.zeros_like(hidden).index_add_(0, token, weighted)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def model_config(vocab_size: int) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=14,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=16,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids, dtype=torch.int32)


@torch.no_grad()
def bits_per_byte(model: Qwen2MoeForCausalLM, ids: torch.Tensor, num_bytes: int, length: int) -> float:
    nats = 0.0
    for chunk in ids[: len(ids) // length * length].long().view(-1, length).split(16):
        logits = model(chunk).logits[:, :-1].float()
        nats += functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum").item()
    predicted = len(ids) // length * (length - 1)
    return nats / math.log(2) / (num_bytes * predicted / len(ids))


def train(model: Qwen2MoeForCausalLM, ids: torch.Tensor, config: TrainConfig) -> list[tuple[int, float]]:
    """AdamW with warm-up and a cosine; returns the loss curve as (step, nats per token) means of 50 steps."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(config.seed)
    start, curve, recent = time.monotonic(), [], []
    for step in range(1, config.steps + 1):
        warmup, cosine = min(1.0, step / 100), 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup * cosine
        offsets = torch.randint(len(ids) - config.length, (config.batch,), generator=generator)
        batch = torch.stack([ids[o : o + config.length] for o in offsets.tolist()]).long()
        output = model(batch, labels=batch, output_router_logits=True)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(output.loss.item() - model.config.router_aux_loss_coef * output.aux_loss.item())
        if step % 50 == 0:
            curve.append((step, sum(recent) / len(recent)))
            print(f"step {step}/{config.steps}  loss {curve[-1][1]:.4f}  {time.monotonic() - start:.0f} s", flush=True)
            recent = []
        if step % 300 == 0:
            save_weights(model, config.output)
    return curve


def save_weights(model: Qwen2MoeForCausalLM, output: Path) -> None:
    state = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(output, state_dict=state)
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16  # of the file; save_pretrained notes that of the model in training
    config.save_pretrained(output)


def write_text(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def write_card(record: dict[str, Any], path: Path) -> None:
    """The model card: what it is, what it was trained on and how well it predicts."""
    files, sizes = record["files"], record["bytes"]
    splits = "\n".join(f"| {split} | {files[split]} | {sizes[split]:,} |" for split in files)
    curve = record["loss_curve"]
    points = curve[:: max(1, len(curve) // 18)] + curve[-1:]
    losses = "\n".join(f"| {step} | {loss:.3f} |" for step, loss in dict(points).items())
    path.write_text(
        f"""---
license: apache-2.0
language: en
tags: [mixture-of-experts, qwen2_moe]
---

# pystdlib-moe

A Qwen2-MoE of {record["parameters"]:,} parameters that continues Python source code. It ships with GloBE so that every
command works on a real, trained mixture of experts without a download; it is of no other use.

14 layers of 16 routed experts (top 4) and a small shared expert; hidden size 128, expert size 48; byte-level BPE with
2,048 tokens; bfloat16.

## Data

The sources of the standard library of Python {record["python"]} (PSF licence), documentation and tests included,
split by a hash of the file's name. The held-out text is in the package (`globe.measure.texts.read_text`), the
calibration text among the benchmarks.

| split | files | bytes |
|---|---|---|
{splits}

## Training

`python scripts/train_shipped_model.py`: {record["steps"]} steps of {record["tokens_per_step"]} tokens, AdamW, peak step
size {record["settings"]["learning_rate"]} with warm-up and a cosine, weight decay {record["settings"]["weight_decay"]},
seed {record["seed"]}, float32 on a CPU (torch {record["torch"]}, transformers {record["transformers"]}).

| step | loss (nats per token, mean of 50 steps) |
|---|---|
{losses}

## Quality

| on all held-out files | bits per byte |
|---|---|
| the model | {record["heldout_bits_per_byte"]:.4f} |
| without its routed experts | {record["heldout_bits_per_byte_without_routed_experts"]:.4f} |

Without its routed experts its perplexity is {record["perplexity_ratio_without_routed_experts"]:.1f} times as high.
"""
    )


def main(config: TrainConfig) -> None:
    torch.manual_seed(config.seed)
    config.output.mkdir(parents=True, exist_ok=True)
    texts = standard_library()
    for split in ("calibration", "heldout"):
        write_text(config.output / f"{split}.txt.gz", END_OF_TEXT.join(texts[split]))
    tokenizer = train_tokenizer(texts["train"])
    tokenizer.save_pretrained(config.output)
    ids = encode(tokenizer, texts["train"])
    sizes = {split: sum(len(text.encode()) for text in texts[split]) for split in texts}
    print({split: (len(texts[split]), sizes[split]) for split in texts}, f"{len(ids)} training tokens", flush=True)

    model = Qwen2MoeForCausalLM(model_config(len(tokenizer)))
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    model.set_experts_implementation("sorted")
    print(f"{model.num_parameters()} parameters", flush=True)
    curve = train(model, ids, config)
    save_weights(model, config.output)

    model = Qwen2MoeForCausalLM.from_pretrained(config.output, dtype=torch.float32)
    heldout = encode(tokenizer, texts["heldout"])
    whole = bits_per_byte(model, heldout, sizes["heldout"], config.length)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.experts.down_proj)
    without = bits_per_byte(model, heldout, sizes["heldout"], config.length)
    bytes_per_token = sizes["heldout"] / len(heldout)
    record = {
        "seed": config.seed,
        "steps": config.steps,
        "tokens_per_step": config.batch * config.length,
        "files": {split: len(texts[split]) for split in texts},
        "bytes": sizes,
        "train_tokens": len(ids),
        "parameters": model.num_parameters(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "heldout_bits_per_byte": whole,
        "heldout_bits_per_byte_without_routed_experts": without,
        "heldout_bytes_per_token": bytes_per_token,
        "perplexity_ratio_without_routed_experts": 2 ** ((without - whole) * bytes_per_token),
        "settings": {name: value for name, value in dataclasses.asdict(config).items() if name != "output"},
        "loss_curve": curve,
    }
    (config.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    write_card(record, config.output / "README.md")
    print(json.dumps({k: v for k, v in record.items() if k != "loss_curve"}, indent=1))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(TrainConfig)))
