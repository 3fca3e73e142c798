"""What the commands print."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from globe.checkpoint.layout import ExpertLayer, dtype_notes, find_expert_layers
from globe.checkpoint.manifest import verify_files, verify_model
from globe.checkpoint.quantized import quant_method
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.checkpoint.source import open_source
from globe.compress import make_job, prepare
from globe.config import CompressConfig
from globe.errors import GlobeError
from globe.evaluate import EvaluateConfig, Evaluation, evaluate_model, generate, load, load_tokenizer, token_windows
from globe.model.quantization_config import QUANT_METHOD
from globe.model.serving import set_compose_cache
from globe.plan import Scope, compact
from globe.progress import Observers, clock, describe
from globe.report import REPORT, Report, peak_memory, versions
from globe.shipped import read_text, resolve_model


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def show_report(console: Console, report: Report, output: Path) -> None:
    """The outcome of a compression."""
    errors = "  ".join(f"{family} {error:.4f}" for family, error in report.family_errors().items())
    ratio = report.compressed_bytes / report.original_bytes
    console.print(f"\n[bold]{output}[/bold]")
    console.print(f"relative error  {errors}  all {report.error:.4f}")
    console.print(f"experts kept    {report.kept:.4f} of the compressed families' parameters")
    console.print(
        f"whole model     {megabytes(report.compressed_bytes)} of {megabytes(report.original_bytes)} ({ratio:.1%})"
    )
    console.print(f"took            {clock(report.seconds)}, at most {megabytes(report.peak_memory_bytes)} of memory")
    if (calibration := report.calibration) is not None:
        console.print(
            f"calibrated      on {calibration.num_tokens} tokens of {calibration.text}; {calibration.num_unreached} of "
            f"{calibration.num_experts} experts were not reached and weigh as their layer's mean"
        )
    fallbacks = sum(bank.metrics.get("num_fallbacks", 0) for bank in report.banks)
    if fallbacks:
        console.print(
            f"note            {fallbacks} adapter solves needed more than a Cholesky factorisation", style="yellow"
        )
    broken = [describe_report(bank.layers, bank.families) for bank in report.banks if bank.outcome == "non_finite"]
    if broken:
        console.print(
            f"note            these fits met NaN or Inf and kept their best step: {'; '.join(broken)}", style="yellow"
        )
    _show_fallbacks(console, report.uncalibrated_because, report.uniform_because, report.config)
    _show_notes(console, report.notes)
    console.print(f"next            globe evaluate {output}")


def describe_report(layers: list[int], families: list[str]) -> str:
    return f"layers {compact(layers)} {'+'.join(families)}"


def show_evaluation(
    console: Console,
    model: str,
    reference: str | None,
    prompt: str | None,
    config: EvaluateConfig,
    compose_cache: int = 0,
    *,
    verify: bool = True,
) -> None:
    """Perplexity and size of a model, beside its reference where there is one, and the text that both write."""
    model = str(resolve_model(model))
    checkpoint = open_checkpoint(model)  # says of a folder that is none what loading it would not
    if verify and checkpoint.repo is None:
        verify_model(checkpoint.folder)
    original = _reference(model, reference)
    tokenizer = load_tokenizer(model)
    windows, bytes_per_token = token_windows(tokenizer, read_text(config.text), config)
    compressed = load(model, config.device)
    cache = set_compose_cache(compressed, compose_cache) if compose_cache else None
    other = None if original is None else load(original, config.device)
    results: dict[str, tuple[str, Evaluation]] = {}
    if other is not None and original is not None:
        results["original"] = original, evaluate_model(other, windows, bytes_per_token, batch=config.batch)
    ours = evaluate_model(compressed, windows, bytes_per_token, batch=config.batch, reference=other)
    results["compressed" if _is_compressed(model) else "model"] = model, ours

    table = Table(title=f"{ours.num_tokens} tokens of {config.text}")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    table.add_row("size on disk", *(megabytes(_size(path)) for path, _ in results.values()))
    table.add_row("perplexity", *(f"{result.perplexity:.3f}" for _, result in results.values()))
    table.add_row("bits per byte", *(f"{result.bits_per_byte:.4f}" for _, result in results.values()))
    if ours.kl is not None and ours.agreement is not None:
        table.add_row("KL to the original (nats per token)", "0", f"{ours.kl:.5f}")
        table.add_row("same next token", "100 %", f"{ours.agreement:.2%}")
    if (report := _report(model)) is not None:
        for family, error in report.family_errors().items():
            table.add_row(f"relative error, {family}", *([""] * (len(results) - 1)), f"{error:.4f}")
    console.print(table)
    if cache is not None:
        console.print(
            f"composed experts kept: {megabytes(cache.resident_bytes)} of {megabytes(cache.num_bytes)}, which served "
            f"{cache.hit_rate:.1%} of what was needed"
        )
    if prompt is not None:
        models = {"original": other, "compressed": compressed} if other is not None else {"model": compressed}
        texts = Table(show_lines=True)
        for name in models:
            texts.add_column(name, ratio=1, overflow="fold")
        texts.add_row(*(Text(prompt + generate(one, tokenizer, prompt)) for one in models.values()))
        console.print(texts)


def _is_compressed(model: str) -> bool:
    if not Path(model).is_dir():
        return False
    return quant_method(open_checkpoint(model)) == QUANT_METHOD


def _reference(model: str, reference: str | None) -> str | None:
    """The model to compare with: the one asked for, or the source of a compressed model if it is a folder at hand."""
    if reference is not None:
        return None if reference == "none" else str(resolve_model(reference))
    report = _report(model)
    source = None if report is None else str(resolve_model(report.source))
    return source if source is not None and Path(source).is_dir() else None


def _report(model: str) -> Report | None:
    """The report beside a compressed model; a copy that save_pretrained made has none."""
    return Report.read(Path(model)) if _is_compressed(model) and (Path(model) / REPORT).is_file() else None


def _size(model: str) -> int:
    checkpoint = open_checkpoint(model)
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def show_inspection(console: Console, model: str, config: CompressConfig) -> None:
    """A model's experts, and the plan of a compression with these settings."""
    folder = resolve_model(model)
    if _is_compressed(str(folder)):
        _show_compressed(console, Report.read(Path(folder)))
        return
    checkpoint = open_source(folder)
    layers = find_expert_layers(checkpoint)
    job = make_job(model, config)
    _show_experts(console, checkpoint, layers)
    _show_notes(console, [*checkpoint.notes, *dtype_notes(layers)])
    preparation = None if checkpoint.repo is not None else prepare(job, Observers(()))
    scopes = job.scopes if preparation is None else preparation.scopes
    _show_plan(console, scopes)
    if preparation is not None:
        because = preparation.calibration.uncalibrated_because
        _show_fallbacks(console, because, preparation.uniform_because, dataclasses.asdict(config))
    elif config.allocation == "sensitivity":
        console.print("note: banks get their shares of the budget when the weights are here", style="yellow")
    original, predicted = job.original_bytes(), job.predicted_bytes(scopes)
    console.print(f"whole model {megabytes(original)} -> {megabytes(predicted)} ({predicted / original:.1%})")
    first = layers[0]
    ratio = first.intermediate_size / first.hidden_size
    if ratio >= 0.9:
        console.print(
            f"note: these experts are coarse (P/D = {ratio:.2f}). The bank is shared along D and every adapter carries "
            "P, so expect a high error unless little is removed; look at the errors of one layer first (--layers)",
            style="yellow",
            soft_wrap=True,
        )


def _show_fallbacks(
    console: Console, uncalibrated: str | None, uniform: str | None, settings: Mapping[str, object]
) -> None:
    """Say it where a fit was not calibrated or its budget not allocated although the settings ask for that."""
    if uncalibrated is not None and settings.get("calibrate") != "none":
        console.print(f"note            fitted to the weights alone: {uncalibrated}", style="yellow", soft_wrap=True)
    if uniform is not None and settings.get("allocation") == "sensitivity":
        console.print(f"note            every bank keeps the same share: {uniform}", style="yellow", soft_wrap=True)


def _show_notes(console: Console, notes: Iterable[str]) -> None:
    """What was passed over in the model's files."""
    for note in notes:
        console.print(f"note            {note}", style="yellow", soft_wrap=True, markup=False)


def _show_experts(console: Console, checkpoint: Checkpoint, layers: list[ExpertLayer]) -> None:
    first = layers[0]
    table = Table(title=f"{checkpoint.folder}: {checkpoint.config.get('model_type')}")
    for name in ("layers", "experts", "P (rows)", "D (columns)", "P/D", "dtype", "on disk"):
        table.add_column(name, justify="right")
    table.add_row(
        compact([layer.index for layer in layers]),
        str(first.num_experts),
        str(first.intermediate_size),
        str(first.hidden_size),
        f"{first.intermediate_size / first.hidden_size:.3f}",
        first.dtype,
        first.layout.replace("_", " "),
    )
    console.print(table)


def _show_plan(console: Console, scopes: Sequence[Scope]) -> None:
    table = Table(title="plan", caption="error: to expect of a fit to the weights alone")
    for name in ("bank", "matrices", "rank", "bases", "kept", "error"):
        table.add_column(name, justify="right")
    banks = [bank for scope in scopes for bank in scope.banks]
    for bank in banks if len(banks) <= 8 else [*banks[:4], None, *banks[-3:]]:
        if bank is None:
            table.add_row("...", *[""] * 5)
        else:
            kept = bank.stored_parameters / bank.original_parameters
            error = "" if bank.predicted_error is None else f"{bank.predicted_error:.3f}"
            shape = (str(bank.num_matrices), str(bank.rank), str(bank.num_bases))
            table.add_row(describe(bank), *shape, f"{kept:.4f}", error)
    console.print(table)


def _show_compressed(console: Console, report: Report) -> None:
    table = Table(title=f"compressed from {report.source}")
    for name in ("bank", "rank", "bases", "error", "outcome"):
        table.add_column(name, justify="right")
    for bank in report.banks:
        table.add_row(
            describe_report(bank.layers, bank.families),
            str(bank.rank),
            str(bank.num_bases),
            f"{bank.error:.4f}",
            bank.outcome,
        )
    console.print(table)
    console.print(
        f"kept {report.kept:.4f} of the compressed families; whole model {megabytes(report.original_bytes)} -> "
        f"{megabytes(report.compressed_bytes)}"
    )


def show_verification(console: Console, folder: Path) -> None:
    """What a folder's files are, compared with what was written; `CheckpointError` for any that differ."""
    found = verify_files(folder)
    console.print(
        f"{found.num_files} files, {megabytes(found.num_bytes)}: every byte is as run {found.run} wrote it",
        soft_wrap=True,
    )
    if found.unlisted:
        console.print(
            f"put there later, and not checked: {', '.join(found.unlisted)}",
            style="yellow",
            soft_wrap=True,
            markup=False,
        )


def show_environment(console: Console) -> None:
    """Versions, devices and optional packages."""
    table = Table(show_header=False)
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("cpu threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    table.add_row("cuda", torch.cuda.get_device_name() if torch.cuda.is_available() else "no")
    table.add_row("mps", "yes" if torch.backends.mps.is_available() else "no")
    for package in ("wandb", "trackio", "tensorboard"):
        table.add_row(package, "installed" if importlib.util.find_spec(package) else "not installed")
    table.add_row("memory so far", megabytes(peak_memory()))
    table.add_row("shipped model", "present" if _shipped_present() else "missing: reinstall globe-moe")
    console.print(table)


def _shipped_present() -> bool:
    try:
        open_checkpoint(resolve_model("shipped"))
    except GlobeError:
        return False
    return True
