"""Train a small mixture whose experts began as copies of one MLP, on the sources of the Python standard library.

    python scripts/train_upcycled_model.py --output runs/upcycled-moe

Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055), as Mixtral and Qwen1.5-MoE are said to have been made: a
dense model is trained first; each of its MLPs is copied into all experts of a layer, a random router is put before
them, which changes nothing as yet, and training goes on. Dense means a mixture of one expert, so that both phases are
the same code. Data, tokenizer and splits are those of the shipped model (`train_shipped_model.py`).
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch
import transformers
import tyro
from torch.nn import functional
from train_shipped_model import (
    TrainConfig,
    bits_per_byte,
    encode,
    save_weights,
    sorted_experts,
    standard_library,
    train,
    train_tokenizer,
)
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """How the upcycled model is trained."""

    output: Path
    """Directory that receives the model."""
    dense_steps: int = 1200
    """Steps of AdamW before the MLPs are copied."""
    steps: int = 1200
    """Steps of AdamW after it; both together take twenty minutes of one core."""
    experts: int = 16
    """Copies of each MLP."""
    top_k: int = 2
    """Experts of a token."""
    batch: int = 8
    """Sequences in a step."""
    length: int = 256
    """Tokens in a sequence."""
    dense_learning_rate: float = 4e-3
    """Peak step size of AdamW before the MLPs are copied."""
    learning_rate: float = 2e-3
    """Peak step size after it."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices."""
    seed: int = 0
    """Seeds initial weights, routers and the order of the batches."""

    def phase(self, steps: int, learning_rate: float, output: Path, seed: int) -> TrainConfig:
        """One of the two phases."""
        return TrainConfig(output, steps, self.batch, self.length, learning_rate, self.weight_decay, seed)


def model_config(vocab_size: int, num_experts: int, top_k: int) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        sliding_window=None,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )


def make_model(config: MixtralConfig) -> MixtralForCausalLM:
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("sorted")
    print(f"{config.num_local_experts} experts: {model.num_parameters()} parameters", flush=True)
    return model


@torch.no_grad()
def upcycle(dense: MixtralForCausalLM, num_experts: int, top_k: int) -> MixtralForCausalLM:
    """The mixture of copies of what is the one expert of `dense`; the routers are random."""
    model = make_model(model_config(dense.config.vocab_size, num_experts, top_k))
    theirs, ours = dense.state_dict(), model.state_dict()
    for name in ours:
        if not name.endswith(".mlp.gate.weight"):
            ours[name].copy_(theirs[name])  # the one expert is broadcast
    ids = torch.arange(16)[None]
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    return model


@torch.no_grad()
def similarity(model: MixtralForCausalLM) -> float:
    """Mean cosine between the gate and up matrices of two experts of a layer."""
    found = list[torch.Tensor]()
    for layer in model.model.layers:
        experts = functional.normalize(layer.mlp.experts.gate_up_proj.flatten(1), dim=1)
        cosines = experts @ experts.mT
        found.append((cosines.sum() - len(cosines)) / (len(cosines) * (len(cosines) - 1)))
    return float(torch.stack(found).mean())


def main(config: UpcycleConfig) -> None:
    torch.manual_seed(config.seed)
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    config.output.mkdir(parents=True, exist_ok=True)
    texts = standard_library()
    tokenizer = train_tokenizer(texts["train"])
    tokenizer.save_pretrained(config.output)
    ids, heldout = encode(tokenizer, texts["train"]), encode(tokenizer, texts["heldout"])
    num_bytes = sum(len(text.encode()) for text in texts["heldout"])
    print(f"{len(ids)} training tokens", flush=True)

    dense = make_model(model_config(len(tokenizer), num_experts=1, top_k=1))
    with tempfile.TemporaryDirectory() as folder:
        phase = config.phase(config.dense_steps, config.dense_learning_rate, Path(folder), config.seed)
        dense_curve = train(dense, ids, phase)
    model = upcycle(dense, config.experts, config.top_k)
    curve = train(model, ids, config.phase(config.steps, config.learning_rate, config.output, config.seed + 1))
    save_weights(model, config.output)

    model = MixtralForCausalLM.from_pretrained(config.output, dtype=torch.float32)
    record = {
        "parameters": model.num_parameters(),
        "train_tokens": len(ids),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dense_heldout_bits_per_byte": bits_per_byte(dense, heldout, num_bytes, config.length),
        "heldout_bits_per_byte": bits_per_byte(model, heldout, num_bytes, config.length),
        "cosine_of_experts": similarity(model),
        "settings": {name: value for name, value in dataclasses.asdict(config).items() if name != "output"},
        "dense_loss_curve": dense_curve,
        "loss_curve": curve,
    }
    (config.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if "curve" not in key}, indent=1))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(UpcycleConfig, description=__doc__)))
