"""Text of a model's own making: what a fit is calibrated on where nobody gives a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from globe.errors import UnsupportedModelError
from globe.measure.runs import LENGTH, NUM_SAMPLES
from globe.model.loading import placeholders, running, text_tokens, window_length


@torch.no_grad()
def sample_windows(model: Any, seed: int) -> Tensor:
    """Token windows (NUM_SAMPLES, LENGTH) from the distribution of a causal language model itself.

    Each begins with a token drawn from the whole vocabulary, so that no two go the same way. Shorter where the model
    takes no more tokens, and without the tokens that stand for pictures.

    Raises `UnsupportedModelError` for a model that cannot generate, and as `running` does.
    """
    if not model.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} does not generate text")
    length, tokens = window_length(model, LENGTH), torch.tensor(text_tokens(model))
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length - 1,
            pad_token_id=0,
            suppress_tokens=placeholders(model) or None,
        ),
    )  # generate() would take what is not said here from the model's: where to stop, penalties
    try:
        with running(model), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            first = tokens[torch.randint(len(tokens), (NUM_SAMPLES, 1))].to(model.device)
            sampled: Tensor = model.generate(first, attention_mask=torch.ones_like(first))
    finally:
        model.generation_config = own
    return sampled.cpu()
