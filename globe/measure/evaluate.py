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

from globe.checkpoint.manifest import verify_model
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.errors import CheckpointError, SettingsError
from globe.measure.reference import Reference, named_reference
from globe.measure.settings import EvaluateConfig
from globe.measure.texts import read_text
from globe.measure.tokenizers import check_same_tokenizer, check_vocabulary, encode, load_tokenizer
from globe.model.loading import load, running


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
    reference: str | None = None
    """What both are told against: `the original`, which was compressed, or another model by its name."""


def token_windows(tokenizer: Any, text: str, config: EvaluateConfig) -> tuple[Tensor, float]:
    """Non-overlapping windows (N, length) of the text's tokens, and the bytes that one token stands for.

    Raises `SettingsError` when the text is shorter than a window, `CheckpointError` when it is not and the tokenizer
    makes next to nothing of it.
    """
    prefix = text[: config.num_characters]
    ids: list[int] = encode(tokenizer, prefix, add_special_tokens=False, verbose=False)["input_ids"]
    num_windows = min(len(ids) // config.length, max(1, config.max_tokens // (config.length - 1)))
    if num_windows < 1 and len(prefix) >= 16 * config.length:
        raise CheckpointError(
            f"the tokenizer makes {len(ids)} tokens of a text of {len(prefix)} characters: unless those are all alike, "
            "its files are not whole, or not this model's; copy them from where the model came from"
        )
    if num_windows < 1:
        raise SettingsError(f"the text has {len(ids)} tokens; one window needs {config.length}: give a longer text")
    windows = torch.tensor(ids[: num_windows * config.length]).view(num_windows, config.length)
    return windows, len(prefix.encode()) / len(ids)


@torch.no_grad()
def evaluate_model(
    model: Any, windows: Tensor, bytes_per_token: float, *, batch: int = 8, reference: Any | None = None
) -> Evaluation:
    """Evaluate causal language model `model` on token windows (N, length), against `reference` where given.

    Raises `CheckpointError` for tokens that a model does not know and for vocabularies of different sizes.
    """
    for one, name in ((model, "the model"), (reference, "the reference")):
        if one is not None:
            check_vocabulary(windows, one, name)
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
    logits = _logits(model, ids)
    other = None if reference is None else _logits(reference, ids)
    if other is not None and other.shape[-1] != logits.shape[-1]:
        raise CheckpointError(
            f"the model predicts one of {logits.shape[-1]} tokens and the reference one of {other.shape[-1]}: there is "
            "no divergence between them; give the model that it was compressed from as the reference, or none"
        )
    for row in range(ids.shape[0]):
        log_p = logits[row, :-1].float().cpu().log_softmax(-1)
        log_q = None if other is None else other[row, :-1].float().cpu().log_softmax(-1)
        yield ids[row, 1:], log_p, log_q


def _logits(model: Any, ids: Tensor) -> Tensor:
    with running(model):
        return model(input_ids=ids.to(model.device)).logits


def read_windows(folder: Path, config: EvaluateConfig) -> tuple[Tensor, float]:
    """The configured text as `token_windows` of the tokenizer in a model's folder."""
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    return token_windows(tokenizer, read_text(config.text, config.num_characters), config)


def check_reference(reference: Reference, model: str | Path, windows: Tensor, config: EvaluateConfig) -> None:
    """Raise `CheckpointError` unless a reference, of another origin than the model, reads the text like the model."""
    if not reference.is_original:
        others, _ = read_windows(open_checkpoint(reference.model).folder, config)
        check_same_tokenizer(windows.flatten().tolist(), others.flatten().tolist(), str(model), reference.model)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 96, seed: int = 0) -> str:
    """A sampled continuation of a prompt; models that agree continue it alike, since the seed is the same."""
    inputs = encode(tokenizer, prompt, return_tensors="pt").to(model.device)
    torch.manual_seed(seed)
    with running(model):
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=True, top_p=0.8)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(
    model: str | Path,
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008
    reference: str | Path | None = None,
    *,
    verify: bool = True,
) -> Evaluation:
    """Quality of a model (`shipped`, a folder or a Hub id) on the configured text, against `reference` where given.

    The files of a folder that GloBE wrote are compared with its manifest first, unless `verify` is off.

    Raises `CheckpointError` for what cannot be loaded or compared and `SettingsError` for a text that is missing, too
    short or none.
    """
    model = resolve_model(model)
    checkpoint = open_checkpoint(model)
    if verify and checkpoint.repo is None:
        verify_model(checkpoint.folder)
    windows, bytes_per_token = read_windows(checkpoint.folder, config)
    if reference is None:
        return evaluate_model(load(model, config.device), windows, bytes_per_token, batch=config.batch)
    against = named_reference(model, reference)
    check_reference(against, model, windows, config)
    other = load(against.model, config.device)
    judged = evaluate_model(load(model, config.device), windows, bytes_per_token, batch=config.batch, reference=other)
    return dataclasses.replace(judged, reference=against.name)
