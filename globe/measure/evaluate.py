"""Quality of a model on a text: perplexity, bits per byte, and the divergence from a reference model."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from globe.checkpoint.card import keep_evaluation
from globe.checkpoint.evaluation import Evaluation
from globe.checkpoint.manifest import read_manifest, verify_model
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.errors import CheckpointError, OutputError, SettingsError
from globe.measure.kept_logits import About, KeptLogits, keep_logits, open_logits
from globe.measure.placed_model import place_model
from globe.measure.reference import Reference, kept_reference, named_reference
from globe.measure.settings import EvaluateConfig
from globe.measure.streamed_logits import StreamedLogits
from globe.measure.tasks import Tasks
from globe.measure.texts import read_text
from globe.measure.tokenizers import chat_writer, check_same_tokenizer, check_vocabulary, encode, load_tokenizer
from globe.model.compose_cache import ComposeCache
from globe.model.loading import running
from globe.model.serving import set_compose_cache


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
    """Evaluate causal language model `model` on token windows (N, length), against `reference` where given. Either may
    also be `StreamedLogits` of one on these windows, the reference `KeptLogits` too.

    Raises `CheckpointError` for tokens that a model does not know and for vocabularies of different sizes.
    """
    for one, name in ((model, "the model"), (reference, "the reference")):
        if one is not None and not isinstance(one, KeptLogits | StreamedLogits):
            check_vocabulary(windows, one, name)
    nats = their_nats = agreed = 0.0
    divergences = list[float]()
    num_windows, predicted = windows.shape[0], windows.shape[1] - 1
    for first in range(0, num_windows, batch):
        for chunk, log_p, log_q in _log_probabilities(model, reference, windows[first : first + batch], first):
            nats += float(functional.nll_loss(log_p, chunk, reduction="sum"))
            if log_q is not None:
                their_nats += float(functional.nll_loss(log_q, chunk, reduction="sum"))
                divergences.append(float(functional.kl_div(log_p, log_q, reduction="sum", log_target=True)) / predicted)
                agreed += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    num_tokens = num_windows * predicted
    alone = Evaluation(math.exp(nats / num_tokens), nats / math.log(2) / (num_tokens * bytes_per_token), num_tokens)
    if reference is None:
        return alone
    return dataclasses.replace(
        alone,
        kl=statistics.fmean(divergences),
        kl_error=statistics.stdev(divergences) / math.sqrt(num_windows) if num_windows > 1 else None,
        agreement=agreed / num_tokens,
        reference_perplexity=math.exp(their_nats / num_tokens),
    )


def _log_probabilities(
    model: Any, reference: Any | None, ids: Tensor, first: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Next tokens (K,) and float32 log probabilities (K, vocabulary) of both models, one window at a time."""
    logits = _logits(model, ids, first)
    other = None if reference is None else _logits(reference, ids, first)
    if other is not None and other.shape[-1] != logits.shape[-1]:
        raise CheckpointError(
            f"the model predicts one of {logits.shape[-1]} tokens and the reference one of {other.shape[-1]}: there is "
            "no divergence between them; give the model that it was compressed from as the reference, or none"
        )
    for row in range(ids.shape[0]):
        log_p = logits[row].float().cpu().log_softmax(-1)
        log_q = None if other is None else other[row].float().cpu().log_softmax(-1)
        yield ids[row, 1:], log_p, log_q


def _logits(model: Any, ids: Tensor, first: int) -> Tensor:
    """Of the next tokens in windows ids (count, length), of which the first is number `first`."""
    if isinstance(model, KeptLogits | StreamedLogits):
        return model.batch(first, len(ids))
    with running(model):
        return model(input_ids=ids.to(model.device)).logits[:, :-1]


def read_windows(folder: Path, config: EvaluateConfig) -> tuple[Tensor, float]:
    """The configured text as `token_windows` of the tokenizer in a model's folder."""
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    return token_windows(tokenizer, read_text(config.text, config.num_characters, chat_writer(tokenizer)), config)


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


@dataclasses.dataclass(frozen=True)
class Judged:
    """A model judged on a text."""

    evaluation: Evaluation
    model: Any
    """Loaded, or its `StreamedLogits`."""
    reference: Any | None
    """The reference, if it is loaded, or its `StreamedLogits`."""
    cache: ComposeCache | None
    """Of composed experts."""
    unrecorded: str | None
    """Why the folder could not take the record."""


def judge(
    model: str | Path,
    config: EvaluateConfig,
    against: Reference | None,
    *,
    logits: Path | None = None,
    compose_cache: int = 0,
) -> Judged:
    """Evaluate a model, and record what was measured in a folder that GloBE wrote.

    With `logits`, a file: the reference's logits are read from it or, if it is not there, kept in it; the reference
    itself then leaves the memory before the model is loaded.
    """
    checkpoint, tasks = open_checkpoint(model), Tasks(config.tasks) if config.tasks else None
    placed = place_model(model, config.device)
    if tasks is not None:
        placed.check_tasks()
    windows, bytes_per_token = read_windows(checkpoint.folder, config)
    text, other = Path(config.text).name, None
    described = {"text": text, "fingerprint": windows_fingerprint(windows)}
    if against is not None:
        described |= {"reference": against.name, "reference_fingerprint": against.fingerprint()}
        other = _reference(against, model, windows, config, logits, About(**described))
    ours = placed.run(windows, config.batch, "the model")
    cache = set_compose_cache(ours, compose_cache) if compose_cache and placed.streamed is None else None
    found = evaluate_model(ours, windows, bytes_per_token, batch=config.batch, reference=other)
    found = dataclasses.replace(found, **described)
    if tasks is not None:
        runs_beside = other is not None and not isinstance(other, KeptLogits | StreamedLogits)
        tokenizer = load_tokenizer(checkpoint.folder, config.trust_remote_code)
        beside = tasks.run(other, tokenizer, config.batch) if runs_beside else []
        found = dataclasses.replace(found, tasks=tasks.run(ours, tokenizer, config.batch, beside))
    unrecorded = None
    if not all(math.isfinite(value) for value in (found.perplexity, found.kl or 0.0)):
        unrecorded = "what was measured is not finite"
    elif checkpoint.repo is None and read_manifest(checkpoint.folder) is not None:
        try:
            keep_evaluation(checkpoint.folder, found)
        except OutputError as error:
            unrecorded = str(error)
    return Judged(found, ours, None if isinstance(other, KeptLogits) else other, cache, unrecorded)


@torch.no_grad()
def _reference(
    against: Reference, model: str | Path, windows: Tensor, config: EvaluateConfig, logits: Path | None, about: About
) -> Any:
    """The reference loaded, or its logits: kept, or streamed where it does not fit into memory or is quantised."""
    if logits is not None and logits.exists():
        kept = open_logits(logits)
        kept.check(about, windows)
        return kept
    check_reference(against, model, windows, config)
    other = place_model(against.model, config.device).run(windows, config.batch, "the reference")
    if logits is None:
        return other
    if not isinstance(other, StreamedLogits):
        check_vocabulary(windows, other, "the reference")
    starts = range(0, len(windows), config.batch)
    batches = (_logits(other, windows[first : first + config.batch], first).cpu() for first in starts)
    return keep_logits(logits, batches, len(windows), dataclasses.replace(about, reference=Path(against.model).name))


def windows_fingerprint(windows: Tensor) -> str:
    return hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.numpy().tobytes()).hexdigest()


def evaluate(
    model: str | Path,
    config: EvaluateConfig = EvaluateConfig(),  # noqa: B008
    reference: str | Path | None = None,
    *,
    reference_logits: str | Path | None = None,
    verify: bool = True,
) -> Evaluation:
    """Quality of a model (`shipped`, a folder or a Hub id) on the configured text, against `reference` where given.

    The files of a folder that GloBE wrote are compared with its manifest first, unless `verify` is off, and what was
    measured is recorded in its evaluation.json. The file `reference_logits` keeps the logits of the reference: where it
    is there, they are read from it, and the reference need be neither named nor at hand. What does not fit into memory,
    or is quantised otherwise, is run a layer at a time, in float32. The tasks of `config` are run by lm-eval on the
    model, which is to fit for that, and on the reference where that is loaded.

    Raises `CheckpointError` for what cannot be loaded or compared, `SettingsError` for a text that is missing, too
    short or none, for logits of another text or reference, for tasks that lm-eval does not have or on a model that does
    not fit, and `OutputError` where the disk has no room for logits.
    """
    model = resolve_model(model)
    checkpoint = open_checkpoint(model)
    if verify and checkpoint.repo is None:
        verify_model(checkpoint.folder)
    logits = None if reference_logits is None else Path(reference_logits)
    against = None if reference is None else named_reference(model, reference)
    if against is None and logits is not None:
        if not logits.exists():
            raise SettingsError(f"{logits} is not there: name the reference whose logits it is to keep")
        against = kept_reference(model, open_logits(logits).about)
    return judge(model, config, against, logits=logits).evaluation
