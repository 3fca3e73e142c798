"""Quality of a model on a text: perplexity, bits per byte, and the divergence from a reference model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import globe.model  # noqa: F401  (registers the native format)
from globe.checkpoint.manifest import verify_model
from globe.errors import CheckpointError, SettingsError
from globe.shipped import read_text, resolve_model
from globe.train.config import check_device, check_device_word
from globe.typed import fit_settings


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What a model is evaluated on."""

    text: str = "heldout"
    """Text to predict: a shipped split (heldout, calibration) or a file."""
    max_tokens: int = 32768
    """Tokens predicted at most."""
    length: int = 256
    """Tokens in a window; windows do not overlap and the first token of each is not predicted."""
    batch: int = 8
    """Windows in a forward pass."""
    device: str = "cpu"
    """Where the models run: cpu, cuda or mps."""

    def __post_init__(self) -> None:
        fit_settings(self, SettingsError, max_tokens=1, length=2, batch=1)
        check_device_word(self.device)
        check_device(self.device)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Quality of a model on one text."""

    perplexity: float
    """exp of the mean negative log likelihood per token."""
    bits_per_byte: float
    """Negative log2 likelihood per byte of UTF-8 text."""
    num_tokens: int
    """Tokens predicted."""
    kl: float | None = None
    """Mean KL(reference ‖ model) per token, in nats; None without a reference."""
    agreement: float | None = None
    """Share of tokens on which both models' most likely next token is the same."""


def token_windows(tokenizer: Any, text: str, config: EvaluateConfig) -> tuple[Tensor, float]:
    """Non-overlapping windows (N, length) of the text's tokens, and the bytes that one token stands for.

    Raises `SettingsError` when the text is shorter than a window.
    """
    needed = config.max_tokens + config.length
    prefix = text[: needed * 16]  # no tokenizer in use makes tokens longer than 16 characters on average
    ids: list[int] = tokenizer(prefix, add_special_tokens=False, verbose=False)["input_ids"]
    num_windows = min(len(ids) // config.length, max(1, config.max_tokens // (config.length - 1)))
    if num_windows < 1:
        raise SettingsError(f"the text has {len(ids)} tokens; one window needs {config.length}: give a longer text")
    windows = torch.tensor(ids[: num_windows * config.length]).view(num_windows, config.length)
    return windows, len(prefix.encode()) / len(ids)


@torch.no_grad()
def evaluate_model(
    model: Any, windows: Tensor, bytes_per_token: float, *, batch: int = 8, reference: Any | None = None
) -> Evaluation:
    """Evaluate causal language model `model` on token windows (N, length), against `reference` where given."""
    nats = divergence = agreed = 0.0
    num_tokens = windows.shape[0] * (windows.shape[1] - 1)
    for ids in windows.split(batch):
        for chunk, log_p, log_q in _log_probabilities(model, reference, ids):
            nats += float(functional.nll_loss(log_p, chunk, reduction="sum"))
            if log_q is not None:
                divergence += float(functional.kl_div(log_p, log_q, reduction="sum", log_target=True))
                agreed += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return Evaluation(
        perplexity=math.exp(nats / num_tokens),
        bits_per_byte=nats / math.log(2) / (num_tokens * bytes_per_token),
        num_tokens=num_tokens,
        kl=None if reference is None else divergence / num_tokens,
        agreement=None if reference is None else agreed / num_tokens,
    )


def _log_probabilities(
    model: Any, reference: Any | None, ids: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Next tokens (K,) and float32 log probabilities (K, vocabulary) of both models, one window at a time."""
    logits = model(input_ids=ids.to(model.device)).logits
    other = None if reference is None else reference(input_ids=ids.to(reference.device)).logits
    for row in range(ids.shape[0]):
        log_p = logits[row, :-1].float().cpu().log_softmax(-1)
        log_q = None if other is None else other[row, :-1].float().cpu().log_softmax(-1)
        yield ids[row, 1:], log_p, log_q


def load(model: str | Path, device: str = "cpu") -> Any:
    """A causal language model from a folder or the Hub, compressed or not, in its own precision, for inference.

    Raises `CheckpointError` with the cause when transformers cannot load it.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype="auto", trust_remote_code=False)
        return loaded.to(device).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} cannot be loaded: {error}") from error


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a model; raises `CheckpointError` with the cause when it has none."""
    try:
        return AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the tokenizer of {model} cannot be loaded: {error}\nIts files (tokenizer.json and the like) belong "
            "beside the weights"
        ) from error


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 96, seed: int = 0) -> str:
    """A sampled continuation of a prompt; models that agree continue it alike, since the seed is the same."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    torch.manual_seed(seed)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, top_p=0.8)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(
    model: str | Path,
    config: EvaluateConfig = EvaluateConfig(),
    reference: str | Path | None = None,
    *,
    verify: bool = True,
) -> Evaluation:
    """Quality of a model (`shipped`, a folder or a Hub id) on the configured text, against `reference` where given.

    The files of a folder that GloBE wrote are compared with its manifest first, unless `verify` is off.

    Raises `CheckpointError` for what cannot be loaded and `SettingsError` for a text that is missing or too short.
    """
    model = resolve_model(model)
    if verify and Path(model).is_dir():
        verify_model(Path(model))
    windows, bytes_per_token = token_windows(load_tokenizer(model), read_text(config.text), config)
    other = None if reference is None else load(resolve_model(reference), config.device)
    return evaluate_model(load(model, config.device), windows, bytes_per_token, batch=config.batch, reference=other)
