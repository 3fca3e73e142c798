"""What the commands print."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from globe.checkpoint.imatrix import IMATRIX, TENSOR_TYPES
from globe.checkpoint.manifest import verify_model
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import Report, is_compressed
from globe.checkpoint.shipped import resolve_model
from globe.errors import CheckpointError, GlobeError, SettingsError
from globe.machine.memory import peak_memory
from globe.measure.evaluate import generate, judge
from globe.measure.kept_logits import open_logits
from globe.measure.reference import Reference, kept_reference, named_reference, report_of, source_reference
from globe.measure.settings import EvaluateConfig
from globe.measure.streamed_logits import StreamedLogits
from globe.measure.tokenizers import load_tokenizer
from globe.plan.scopes import Scope, compact
from globe.plan.settings import CompressConfig
from globe.report.inspection import show_notes
from globe.run.coding import CodingPlan
from globe.run.imatrix import TypePlan
from globe.run.job import Job
from globe.run.observer import Observers, clock, describe
from globe.run.outline import Outline
from globe.run.prepare import prepare
from globe.run.rounding import RoundingPlan
from globe.run.size import bits_to_fit, cache_per_token
from globe.terminal import Terminal
from globe.typed import shown
from globe.units import byte_size, read_size, with_error
from globe.version import versions


def show_report(console: Terminal, report: Report, output: Path) -> None:
    """The outcome of a compression."""
    errors = "  ".join(f"{family} {error:.4f}" for family, error in report.family_errors().items())
    ratio = report.compressed_bytes / report.original_bytes
    console.print(f"\n{output}", style="bold", soft_wrap=True)
    console.print(f"relative error  {errors}  all {report.error:.4f}")
    if report.bits is None:
        console.print(f"experts kept    {report.kept:.4f} of the compressed families' parameters")
    else:
        console.print(f"experts coded   in {report.bits:.3f} bits a weight, everything counted")
    console.print(
        f"whole model     {byte_size(report.compressed_bytes)} of {byte_size(report.original_bytes)} ({ratio:.1%})"
    )
    place = "" if report.config["device"] == "cpu" else f" on {report.config['device']}"
    console.print(
        f"took            {clock(report.seconds)}{place}, at most {byte_size(report.peak_memory_bytes)} of memory"
    )
    if (calibration := report.calibration) is not None:
        console.print(
            f"calibrated      on {calibration.num_tokens} tokens of {calibration.text}; {calibration.num_unreached} of "
            f"{calibration.num_experts} experts were not reached and weigh as their layer's mean"
        )
        if calibration.on_cpu_because is not None:
            console.print(f"note            the model ran on the CPU: {calibration.on_cpu_because}", style="yellow")
        if calibration.streamed_because is not None:
            alone = "" if report.config["calibrate"] != "samples" else ", so not on samples of its own"
            console.print(
                f"note            the model ran a layer at a time{alone}: {calibration.streamed_because}",
                style="yellow",
                soft_wrap=True,
            )
    fallbacks = sum(bank.metrics.get("num_fallbacks", 0) for bank in report.banks)
    if fallbacks:
        console.print(
            f"note            {fallbacks} adapter solves needed more than a Cholesky factorisation", style="yellow"
        )
    broken = [describe(bank) for bank in report.banks if bank.outcome == "non_finite"]
    if broken:
        console.print(
            f"note            these fits met NaN or Inf and kept their best step: {'; '.join(broken)}", style="yellow"
        )
    _show_fallbacks(console, report.uncalibrated_because, report.uniform_because, report.config)
    _show_uncompensated(console, report)
    show_notes(console, report.notes)
    console.print(f"next            globe evaluate {shlex.quote(str(output))}", soft_wrap=True)


def show_types(console: Terminal, plan: TypePlan, output: Path) -> None:
    """What llama.cpp is to do with a model, and the command that has it do so."""
    counts = Counter(plan.types.values())
    console.print(f"\n{output}", style="bold", soft_wrap=True)
    console.print(
        f"experts         in {plan.bits:.3f} bits a weight, by tensor: "
        + ", ".join(f"{count} {ggml_type}" for ggml_type, count in counts.most_common()),
        soft_wrap=True,
    )
    console.print(f"loss            about {plan.predicted_kl:.2g} nats a token by second-order theory", soft_wrap=True)
    imatrix, types = (shlex.quote(str(output / name)) for name in (IMATRIX, TENSOR_TYPES))
    console.print(
        f"next            llama-quantize --imatrix {imatrix} --tensor-type-file {types} "
        "MODEL-BF16.gguf MODEL.gguf Q8_0",
        soft_wrap=True,
    )


def show_evaluation(
    console: Terminal,
    model: str,
    reference: str | None,
    prompt: str | None,
    config: EvaluateConfig,
    compose_cache: int = 0,
    *,
    logits: Path | None = None,
    verify: bool = True,
) -> None:
    """Perplexity and size of a model, beside its reference where there is one, and the text that both write."""
    model = str(resolve_model(model))
    checkpoint = open_checkpoint(model)  # says of a folder that is none what loading it would not
    if verify and checkpoint.repo is None:
        verify_model(checkpoint.folder)
    against = _reference(console, model, reference, logits)
    judged = judge(model, config, against, logits=logits, compose_cache=compose_cache)
    ours, report = judged.evaluation, report_of(model)
    table = Table(title=f"{ours.num_tokens} tokens of {config.text}{_place(judged.model)}")
    table.add_column("")
    names, sizes, theirs = list[str](), list[str](), list[tuple[str, str]]()
    if against is not None and ours.reference_perplexity is not None:
        names.append("original" if against.is_original else against.model)
        size = report.original_bytes if against.is_original and report is not None else _size(against.model)
        sizes.append(byte_size(size))
        bits = ours.bits_per_byte * math.log(ours.reference_perplexity) / math.log(ours.perplexity)
        theirs.append((f"{ours.reference_perplexity:.3f}", f"{bits:.4f}"))
    names.append("compressed" if is_compressed(model) else "model")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("size on disk", *sizes, byte_size(_size(model)))
    table.add_row("perplexity", *(perplexity for perplexity, _ in theirs), f"{ours.perplexity:.3f}")
    table.add_row("bits per byte", *(bits for _, bits in theirs), f"{ours.bits_per_byte:.4f}")
    if against is not None and ours.kl is not None and ours.agreement is not None:
        table.add_row(f"KL to {against.name} (nats per token)", "0", with_error(ours.kl, ours.kl_error))
        table.add_row("same next token", "100%", f"{ours.agreement:.2%}")
    for each in ours.tasks:
        beside = "" if each.reference is None else f"{each.reference:.5f}"
        table.add_row(each.name, *([beside] * len(theirs)), with_error(each.value, each.error))
    if report is not None:
        for family, error in report.family_errors().items():
            table.add_row(f"relative error, {family}", *([""] * len(theirs)), f"{error:.4f}")
    console.print(table)
    if against is not None and against.is_original:
        console.print(f"original: {against.model}", soft_wrap=True)
    for one, what in ((judged.reference, "what it is compared with"), (judged.model, "the model")):
        if isinstance(one, StreamedLogits):
            silent = "" if prompt is None else " (and does not continue the prompt)"
            told = f"{what} ran a layer at a time, in float32{silent}: {one.because}"
            console.print(f"note: {told}", style="yellow", soft_wrap=True)
    if judged.unrecorded is not None:
        console.print(f"note: not recorded: {judged.unrecorded}", style="yellow", soft_wrap=True)
    if judged.cache is not None:
        cache = judged.cache
        console.print(
            f"composed experts kept: {byte_size(cache.resident_bytes)} of {byte_size(cache.num_bytes)}, which served "
            f"{cache.hit_rate:.1%} of what was needed"
        )
    if prompt is not None:
        tokenizer = load_tokenizer(checkpoint.folder, config.trust_remote_code)
        texts, written = Table(show_lines=True), list[Text]()
        for name, one in ((names[0], judged.reference), (names[-1], judged.model)):
            if one is not None and not isinstance(one, StreamedLogits):
                texts.add_column(name, ratio=1, overflow="fold")
                written.append(Text(prompt + generate(one, tokenizer, prompt)))
        if written:
            texts.add_row(*written)
            console.print(texts)


def _place(model: Any) -> str:
    return "" if model.device.type == "cpu" else f" on {model.device}"


def _reference(console: Terminal, model: str, asked: str | None, logits: Path | None) -> Reference | None:
    """The model to compare with: the one asked for, the one whose logits were kept, or the source of a compressed model
    if it is at hand."""
    if asked is not None:
        return None if asked == "none" else named_reference(model, asked)
    if logits is not None and logits.exists():
        return kept_reference(model, open_logits(logits).about)
    try:
        return source_reference(model)
    except CheckpointError as error:
        console.print(f"note: compared with nothing: {error}", style="yellow", soft_wrap=True)
        return None


def _size(model: str) -> int:
    checkpoint = open_checkpoint(model)
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def fitted_config(console: Terminal, outlined: Outline, config: CompressConfig, size: str) -> CompressConfig:
    """The settings with the most bits that fit a size, which are told with what else a runtime needs."""
    if (num_bytes := read_size(size)) is None:
        raise SettingsError(f"fit is {shown(size)}; it must be a size such as 16GB or 15.5GiB")
    if config.bits is not None:
        raise SettingsError("fit chooses bits: give one of them")
    bits, cache = bits_to_fit(outlined, num_bytes), cache_per_token(outlined)
    beside = "" if cache is None else f", {byte_size(1000 * cache)} of keys and values for each 1,000 tokens of context"
    console.print(
        f"{bits:g} bits fit {byte_size(num_bytes)}; beside the weights a runtime needs its activations{beside}",
        soft_wrap=True,
    )
    return dataclasses.replace(config, bits=bits)


def show_prepared(console: Terminal, job: Job, told: Sequence[str]) -> None:
    """What running the model tells, and the notes that were not told before."""
    preparation = prepare(job, Observers(()))
    if not job.config.is_coded:
        _show_plan(console, preparation.scopes)
    because, coding = preparation.calibration.uncalibrated_because, preparation.coding
    _show_fallbacks(console, because, preparation.uniform_because, dataclasses.asdict(job.config))
    original, predicted = job.original_bytes(), job.predicted_bytes(preparation.scopes, coding and coding.num_bytes)
    console.print(f"whole model {byte_size(original)} -> {byte_size(predicted)} ({predicted / original:.1%})")
    if coding is not None:
        _show_coding(console, job, coding)
    show_notes(console, [note for note in job.notes if note not in told])


def _show_coding(console: Terminal, job: Job, plan: CodingPlan | RoundingPlan) -> None:
    """What the budget of bits buys."""
    bits = 8 * plan.num_bytes / job.original_parameters()
    console.print(f"experts     in {bits:.3f} bits a weight, everything counted")
    if plan.predicted_kl is not None:
        console.print(
            f"loss        about {plan.predicted_kl:.2g} nats a token by second-order theory; two models that were "
            "judged had 1.3 to 2.4 times what it says",
            soft_wrap=True,
        )
    if isinstance(plan, RoundingPlan):
        for width in sorted(set(plan.widths.values())):
            layers = [index for index, bits in plan.widths.items() if bits == width]
            console.print(f"{width} bits      layers {compact(layers)}")
    elif shared := sum(count > 0 for count in plan.num_bases.values()):
        console.print(f"banks       pay for {shared} of {len(plan.num_bases)} stacks of experts")


def _show_fallbacks(
    console: Terminal, uncalibrated: str | None, uniform: str | None, settings: Mapping[str, object]
) -> None:
    """Say it where a fit was not calibrated or its budget not allocated although the settings ask for that."""
    if uncalibrated is not None and settings.get("calibrate") != "none":
        console.print(f"note            fitted to the weights alone: {uncalibrated}", style="yellow", soft_wrap=True)
    if uniform is not None and settings.get("allocation") == "sensitivity":
        in_banks = settings.get("keep") is not None or settings.get("rank_ratio") is not None
        what = "every bank keeps the same share" if in_banks else "every expert counts the same"
        console.print(f"note            {what}: {uniform}", style="yellow", soft_wrap=True)


def _show_uncompensated(console: Terminal, report: Report) -> None:
    """Say where coded layers do not make up for the errors of those before them although they could be run."""
    is_packed = report.config.get("format") == "compressed-tensors"  # where none does
    if report.uncalibrated_because is not None or is_packed or "down" not in report.config["families"]:
        return
    because = report.uncompensated_because
    alone = [part.layer for part in report.coded if part.family == "down" and part.compensated is None]
    if alone and because is None:
        because = "what their experts add is not added to their output as it is, or not finite"
    if alone:
        console.print(
            f"note            layers {compact(alone)} do not make up for the errors of those before them: {because}",
            style="yellow",
            soft_wrap=True,
        )


def _show_plan(console: Terminal, scopes: Sequence[Scope]) -> None:
    table = Table(title="plan", caption="error: to expect of a fit to the weights alone")
    for name in ("bank", "matrices", "rank", "bases", "kept", "error"):
        table.add_column(name, justify="right")
    banks = [bank for scope in scopes for bank in scope.banks]
    for bank in banks if len(banks) <= 8 else [*banks[:4], None, *banks[-3:]]:
        if bank is None:
            table.add_row("...", *[""] * 5)
        else:
            shape, error = bank.shape, "" if bank.predicted_error is None else f"{bank.predicted_error:.3f}"
            sizes = (str(shape.num_matrices), str(shape.rank), str(shape.num_bases))
            table.add_row(describe(bank), *sizes, f"{shape.share:.4f}", error)
    console.print(table)


def show_environment(console: Terminal) -> None:
    """Versions, devices and optional packages."""
    table = Table(show_header=False)
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("cpu threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    table.add_row("cuda", torch.cuda.get_device_name() if torch.cuda.is_available() else "no")
    table.add_row("mps", "yes" if torch.backends.mps.is_available() else "no")
    for package in ("datasets", "gguf", "lm_eval", "pandas", "tensorboard", "trackio", "vllm", "wandb"):
        table.add_row(package, "installed" if importlib.util.find_spec(package) else "not installed")
    table.add_row("memory so far", byte_size(peak_memory()))
    table.add_row("shipped model", "present" if _shipped_present() else "missing: reinstall globe-moe")
    console.print(table)


def _shipped_present() -> bool:
    try:
        open_checkpoint(resolve_model("shipped"))
    except GlobeError:
        return False
    return True
