"""The budget of bits that fits a memory, and the least that keeps a loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from globe.checkpoint.evaluation import of_original, read_evaluations
from globe.checkpoint.report import Report
from globe.checkpoint.shipped import resolve_model
from globe.errors import FinishedError, OutputError, SettingsError
from globe.measure.evaluate import judge
from globe.measure.reference import Reference
from globe.measure.settings import EvaluateConfig
from globe.model.configuration import read_config, text_config
from globe.plan.budget import LEAST_BITS, MOST_BITS, MOST_PACKED_BITS, Bits
from globe.plan.settings import CompressConfig
from globe.run.compress import run_job
from globe.run.folder import check_vacant, is_written
from globe.run.job import make_job
from globe.run.observer import Observer, Observers
from globe.run.outline import Outline
from globe.run.prepare import run_all
from globe.run.ranks import ALONE, Ranks
from globe.units import byte_size

_STEP = 0.05
"""Bits between the budgets that are tried."""
_FIRST = 4.0
_CLOSE = 0.8
"""Of the loss that is allowed: what comes so near is near enough."""


def bits_to_fit(outline: Outline, num_bytes: float) -> float:
    """The most stored bits per weight, to two digits, at which all tensors of the output take at most `num_bytes`.

    Raises `SettingsError` where the least that experts can be coded in is too much.
    """
    if not outline.config.is_coded:
        raise SettingsError("fit chooses bits: leave out keep and the ratios")

    def size(bits: float) -> int:
        config = dataclasses.replace(outline.config, bits=bits)
        return dataclasses.replace(outline, config=config).predicted_bytes(outline.scopes)

    is_packed = outline.config.is_packed
    lowest, most = (outline.least_packed_bits(), MOST_PACKED_BITS) if is_packed else (LEAST_BITS, MOST_BITS)
    least = size(lowest)
    beside = least - Bits(lowest).num_bytes(outline.original_parameters())
    if least > num_bytes:
        raise SettingsError(
            f"{outline.source} cannot fit {byte_size(num_bytes)}: with its experts in {lowest:g} bits, the least, "
            f"it takes {byte_size(least)}, of which {byte_size(beside)} are not compressed: choose a smaller model"
        )
    bits = 8 * (num_bytes - beside) / outline.original_parameters()
    return min(most, math.floor(100 * bits + 1e-6) / 100)


def cache_per_token(outline: Outline) -> int | None:
    """Bytes of keys and values that a token of context takes in 16 bits; None where config.json does not tell."""
    text = text_config(read_config(outline.checkpoint))
    layers, latent = getattr(text, "num_hidden_layers", None), getattr(text, "kv_lora_rank", None)
    if layers and latent:
        return 2 * layers * (latent + getattr(text, "qk_rope_head_dim", 0))
    heads, size = getattr(text, "num_key_value_heads", None), getattr(text, "head_dim", None)
    if size is None and getattr(text, "num_attention_heads", None):
        size = text.hidden_size // text.num_attention_heads
    return 2 * 2 * layers * heads * size if layers and heads and size else None


def least_bits(loss: Callable[[float], float], most: float) -> float | None:
    """The least budget, of those 0.05 bits apart, whose loss is at most `most`; None where not even 8 bits do.

    The loss falls with the bits, about as 2^(-slope·bits): each trial is where the last two say that `most` is reached.
    It ends when the best is next to one that loses too much, or within a fifth of what is allowed.
    """
    tried = dict[int, float]()
    place, first, last = (round(bits / _STEP) for bits in (_FIRST, LEAST_BITS, MOST_BITS))
    passed = last + 1
    while place not in tried:
        tried[place] = loss(place * _STEP)
        passed = min((tick for tick, lost in tried.items() if lost <= most), default=last + 1)
        failed = max((tick for tick, lost in tried.items() if lost > most and tick < passed), default=first - 1)
        if passed - failed <= 1 or (passed in tried and tried[passed] >= _CLOSE * most):
            break
        place = min(max(_next(tried, most), failed + 1), passed - 1)
    return passed * _STEP if passed in tried else None


def _next(tried: dict[int, float], most: float) -> int:
    """Where a line of log loss against bits through the two trials nearest to `most` is a little below it."""
    nearest = sorted(tried, key=lambda tick: abs(math.log(max(tried[tick], 1e-12) / most)))[:2]
    here, slope = nearest[0], -2 * _STEP * math.log(2)
    if len(nearest) == 2 and (rise := math.log(max(tried[nearest[1]], 1e-12) / max(tried[here], 1e-12))) != 0:
        slope = min(rise / (nearest[1] - here), slope / 8)
    aim = math.log(math.sqrt(_CLOSE) * most / max(tried[here], 1e-12))
    return here + math.ceil(aim / slope) if aim < 0 else here + math.floor(aim / slope)


def compress_within(
    model: str | Path,
    output: str | Path,
    max_kl: float,
    config: CompressConfig = CompressConfig(),  # noqa: B008
    evaluate: EvaluateConfig = EvaluateConfig(),  # noqa: B008
    observers: Iterable[Observer] = (),
    *,
    overwrite: bool = False,
    revision: str | None = None,
    cache: Path | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """The smallest compression of `model` whose KL to it is at most `max_kl` nats per token on a text.

    The model is measured once; then it is coded and judged at a few budgets, in a folder beside the output. A run that
    was killed goes on with the trials that are finished. Raises as `compress` and `evaluate` do, and `SettingsError`
    where even 8 bits lose more.
    """
    if max_kl <= 0:
        raise SettingsError(f"max_kl is {max_kl:g}; it must be above 0: nats per token, 0.01 for example")
    if config.is_packed:
        raise SettingsError("max_kl is for GloBE's own format: leave format out, or give bits")
    if not config.is_coded or config.bits is not None:
        raise SettingsError("max_kl chooses bits: leave out bits, keep and the ratios")
    output, watch = Path(output), Observers(observers)
    if not (overwrite and is_written(output)):
        check_vacant(output)
    trials = output.with_name(f"{output.name}.trials")
    try:
        first = make_job(model, dataclasses.replace(config, bits=_FIRST), revision, cache)
        calibrated = functools.cache(functools.partial(run_all, first, watch))
        original = resolve_model(model) if first.checkpoint.repo is None else first.checkpoint.fetched()
        if first.checkpoint.folder.resolve().is_relative_to(output.resolve()):
            raise OutputError(f"output {output} holds the model that is read: choose another name")
        reference = Reference(str(original), is_original=True, known=first.checkpoint.fingerprint())

        def loss(bits: float) -> float:
            folder, job = trials / f"{bits:.2f}", make_job(model, _at(config, bits), revision, cache)
            with contextlib.suppress(FinishedError):  # by an earlier try
                run_job(job, folder, watch, overwrite=overwrite, calibrated=calibrated, ranks=ranks)
            known = of_original(read_evaluations(folder))
            found = judge(folder, evaluate, reference).evaluation if known is None else known
            assert found.kl is not None
            watch.note(f"at {bits:.2f} bits the KL to the original is {found.kl:.5f} nats per token")
            return found.kl

        bits = least_bits(loss, max_kl)
        if bits is None:
            raise SettingsError(f"even {MOST_BITS:g} bits lose more than {max_kl:g} nats per token on this text")
        if output.exists():
            shutil.rmtree(output)
        (trials / f"{bits:.2f}").rename(output)
        shutil.rmtree(trials)
        return Report.read(output)
    finally:
        watch.stop()


def _at(config: CompressConfig, bits: float) -> CompressConfig:
    return dataclasses.replace(config, bits=round(bits, 2))
