"""Text of a model's own making: what a fit is calibrated on where nobody gives a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

NUM_SAMPLES, LENGTH = 64, 128
"""Windows, and tokens in each; measured, see docs/log.md."""


@torch.no_grad()
def sample_windows(model: Any, seed: int) -> Tensor:
    """Token windows (NUM_SAMPLES, LENGTH) from the distribution of a causal language model itself.

    Each begins with a token drawn from the whole vocabulary, so that no two go the same way. Shorter where the model
    takes no more tokens. Raises whatever the model's code raises when it cannot generate.
    """
    config = model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH))
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1, pad_token_id=0
        ),
    )  # generate() would take what is not said here from the model's: where to stop, penalties
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            first = torch.randint(config.vocab_size, (NUM_SAMPLES, 1)).to(model.device)
            sampled: Tensor = model.generate(first, attention_mask=torch.ones_like(first))
    finally:
        model.generation_config = own
    return sampled.cpu()
