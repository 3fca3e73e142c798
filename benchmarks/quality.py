"""Error, perplexity and divergence of GloBE, truncated SVD and MoBE at equal stored parameters.

    python -m benchmarks.quality [--rivals all]

Every method gets the same weights and a budget of stored parameters, and what it stores is rounded to the precision of
the checkpoint. GloBE goes the whole way: compressed to a directory and loaded from it. All models are evaluated in
float32 on the same held-out tokens, against the original.

With `--rivals all` the other factorisations, pruning and merging come in at the same budgets, rounding of the weights
alone at the bytes that it takes, and GloBE's coded experts. GloBE is calibrated on samples of the model
itself, its default, and also fitted to the weights alone and calibrated as the rivals are that need a text: on the
calibration split, python_library.txt, and nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.calibration import CALIBRATION, Calibration, calibrate
from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.rivals.d2_moe import d2_moe
from benchmarks.rivals.gptq import gptq
from benchmarks.rivals.mobe import best_shape, mobe, published_shape
from benchmarks.rivals.molae import molae
from benchmarks.rivals.ream import ream
from benchmarks.rivals.reap import reap
from benchmarks.rivals.rounding import bits_of_a_weight, rounding
from benchmarks.rivals.truncated_svd import truncated_svd
from benchmarks.rivals.tucker import td_moe
from benchmarks.rivals.whitened_svd import whitened_svd
from benchmarks.stacks import Approximation, Stacks, family_errors, read_stacks, remove_experts, write_stacks
from benchmarks.tables import Column, print_claims, print_table
from globe import CompressConfig, EvaluateConfig, compress
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.measure.evaluate import evaluate_model, token_windows
from globe.measure.texts import read_text
from globe.model.names import is_factor
from globe.report.style import MARKERS, STYLE

PERPLEXITY_RISE = 0.02
"""Largest rise of GloBE's perplexity at keep 0.75 that is claimed."""
CLAIMED_KEEP = 0.75
"""The split that rivals are calibrated on."""
TEXTS = {"": "samples", ", weights alone": "none", ", on the text": CALIBRATION}
"""What GloBE is calibrated on, by what is added to its name."""
CALIBRATED: Mapping[str, Callable[[Stacks, float, torch.dtype, Calibration], Approximation]] = {
    "whitened SVD": whitened_svd,
    "D²-MoE": d2_moe,
    "TD-MoE": td_moe,
    "REAP": reap,
    "REAM": ream,
}
"""Rivals that take a budget and the statistics of the calibration text."""
ROUNDINGS = ((8, 32), (4, 32), (4, 128), (3, 32), (3, 128), (2, 32), (2, 64), (2, 128))
"""Bits to which the weights alone are rounded, and weights that share a scale and an offset."""
CLAIMED_RATIO = 0.5
"""KL of coded experts over that of the better rounding that takes no more of them, at most."""
COLUMNS = (
    Column("keep", "keep", "g"),
    Column("method", "method"),
    Column("shape", "shape"),
    Column("stored", "stored", ".3f"),
    Column("error", "error", ".4f"),
    Column("gate", "gate", ".4f"),
    Column("up", "up", ".4f"),
    Column("down", "down", ".4f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("perplexity_rise", "rise", "+.2%"),
    Column("kl", "KL", ".5f"),
    Column("seconds", "seconds", ".1f"),
    Column("seconds_over_globe", "x GloBE", ".2f"),
)
_TICKS = (0.15, 0.2, 0.25, 0.35, 0.5, 0.75)
"""Of the picture's axis of bytes."""
ALL_COLUMNS = (*COLUMNS[:4], Column("bytes", "bytes", ".3f"), *COLUMNS[4:])
"""With what is stored in bytes over the bytes in bfloat16."""


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """What is compared."""

    model: str = "shipped"
    """`shipped`, a local directory or a Hub id."""
    keeps: tuple[float, ...] = (0.75, 0.625, 0.5, 0.35)
    """Budgets: stored parameters of the experts over the original ones."""
    bits: tuple[float, ...] = (4.0, 3.0, 2.5)
    """With all rivals: bits per weight that GloBE's coded experts take, everything counted."""
    mobe_epochs: int = 2000
    """Adam steps of MoBE."""
    steps: int = 500
    """Steps of GloBE."""
    seed: int = 0
    """Seeds what is random."""
    threads: int = 1
    """CPU threads of all methods."""
    max_tokens: int = 32768
    """Held-out tokens predicted."""
    layers: tuple[int, ...] | None = None
    """Layers to compress; None: all."""
    rivals: Literal["few", "all"] = "few"
    """`few`: truncated SVD and MoBE. `all`: every other one too."""
    calibration_tokens: int = 50_000
    """Tokens of the calibration split that calibrated rivals see."""
    output: Path | None = None
    """Where the record is written; None: quality.json in the results, or quality_all.json with all rivals."""


class Evaluator:
    """Models judged on the same tokens against the same original, in float32."""

    def __init__(self, model: str | Path, max_tokens: int) -> None:
        self._original = _load(model)
        self._tokenizer = AutoTokenizer.from_pretrained(str(model))
        self.windows, self._bytes_per_token = self.split("heldout", max_tokens)

    def original(self) -> dict[str, float]:
        """Perplexity of the original."""
        return self._judge(self._original)

    def approximation(self, stacks: Stacks, kept_experts: Mapping[int, torch.Tensor]) -> dict[str, float]:
        """Quality of the original with some of its experts replaced and, where not all are kept, some removed."""
        model = copy.deepcopy(self._original)
        write_stacks(model, stacks)
        remove_experts(model, kept_experts)
        return self._judge(model)

    def calibration(self, windows: torch.Tensor, stacks: Stacks) -> Calibration:
        """Statistics of the original on token windows (N, length), of the layers that `stacks` has."""
        return calibrate(self._original, windows, {layer for layer, _ in stacks})

    def directory(self, folder: Path) -> dict[str, float]:
        """Quality of the model in a directory."""
        return self._judge(_load(folder))

    def split(self, name: str, max_tokens: int) -> tuple[torch.Tensor, float]:
        """Token windows (N, length) from the beginning of a shipped split, and bytes per token."""
        return token_windows(self._tokenizer, read_text(name), EvaluateConfig(max_tokens=max_tokens))

    def _judge(self, model: Any) -> dict[str, float]:
        reference = None if model is self._original else self._original
        found = evaluate_model(model, self.windows, self._bytes_per_token, reference=reference)
        if found.kl is None or found.agreement is None:
            return {"perplexity": found.perplexity}
        return {"perplexity": found.perplexity, "kl": found.kl, "agreement": found.agreement}


def _load(model: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()


def globe_row(
    config: QualityConfig, evaluator: Evaluator, method: str = "GloBE", calibrate: str = "samples", **budget: float
) -> dict[str, Any]:
    """GloBE at its defaults within a `budget`, keep or bits: compressed to a directory, loaded from it and judged."""
    steps = {} if "bits" in budget else {"steps": config.steps}
    settings = CompressConfig(
        **steps,
        seed=config.seed,
        layers=config.layers,
        calibrate=calibrate,
        calibration_tokens=config.calibration_tokens,
        **budget,
    )
    with tempfile.TemporaryDirectory() as folder:
        report = compress(resolve_model(config.model), Path(folder) / "compressed", settings)
        quality = evaluator.directory(Path(folder) / "compressed")
        found = open_checkpoint(Path(folder) / "compressed").tensors.values()
        factors = sum(tensor.nbytes for tensor in found if is_factor(tensor.name))
    return {
        **budget,
        "method": method,
        "shape": ", ".join(f"R={bank.shape.rank} M={bank.shape.num_bases}" for bank in report.banks[:1]),
        "stored": report.kept,
        "bytes": factors / (2 * report.original_parameters),
        "error": report.error,
        **report.family_errors(),
        **quality,
        "seconds": report.seconds,
    }


def rival_row(
    keep: float, method: str, stacks: Stacks, approximation: Approximation, evaluator: Evaluator
) -> dict[str, Any]:
    """A rival's approximation within a budget, judged."""
    return {
        "keep": keep,
        "method": method,
        "shape": approximation.shape,
        "stored": approximation.stored_parameters / sum(stack.numel() for stack in stacks.values()),
        **judged(stacks, approximation, evaluator),
    }


def judged(stacks: Stacks, approximation: Approximation, evaluator: Evaluator) -> dict[str, Any]:
    """Error, quality and time of an approximation."""
    return {
        **family_errors(stacks, approximation.stacks),
        **evaluator.approximation(approximation.stacks, approximation.kept_experts),
        "seconds": approximation.seconds,
    }


def rows_at(
    config: QualityConfig, keep: float, stacks: Stacks, dtype: torch.dtype, evaluator: Evaluator
) -> Iterator[dict[str, Any]]:
    """All methods at one budget. MoBE comes as published, with R = P, and with the shape that serves it best."""
    yield globe_row(config, evaluator, keep=keep)
    yield rival_row(keep, "truncated SVD", stacks, truncated_svd(stacks, keep, dtype), evaluator)
    shape_of = next(iter(stacks.values())).shape
    published, best = published_shape(*shape_of, keep), best_shape(*shape_of, keep)
    if published is not None:
        approximation = mobe(stacks, published, config.mobe_epochs, dtype)
        yield rival_row(keep, "MoBE, R = P", stacks, approximation, evaluator)
    if best != published:
        approximation = mobe(stacks, best, config.mobe_epochs, dtype)
        yield rival_row(keep, "MoBE, R < P", stacks, approximation, evaluator)


def more_rows_at(
    config: QualityConfig,
    keep: float,
    stacks: Stacks,
    dtype: torch.dtype,
    calibration: Calibration,
    evaluator: Evaluator,
) -> Iterator[dict[str, Any]]:
    """The rivals that `rows_at` leaves out, at one budget; the calibration counts to the time of those that use it."""
    shape_of = next(iter(stacks.values())).shape
    shape = published_shape(*shape_of, keep) or best_shape(*shape_of, keep)
    tanh = mobe(stacks, shape, config.mobe_epochs, dtype, activation="tanh")
    yield rival_row(keep, "MoBE, tanh", stacks, tanh, evaluator)
    yield rival_row(keep, "MoLAE", stacks, molae(stacks, keep, dtype), evaluator)
    for method, rival in CALIBRATED.items():
        found = rival(stacks, keep, dtype, calibration)
        found = dataclasses.replace(found, seconds=found.seconds + calibration.seconds)
        yield rival_row(keep, method, stacks, found, evaluator)


def rounding_rows(stacks: Stacks, calibration: Calibration, evaluator: Evaluator) -> Iterator[dict[str, Any]]:
    """Rounding of the weights alone, plain and with error feedback, each at the bytes that it takes."""
    for bits, group in ROUNDINGS:
        plain, feedback = rounding(stacks, bits, group), gptq(stacks, bits, calibration, group)
        feedback = dataclasses.replace(feedback, seconds=feedback.seconds + calibration.seconds)
        for method, found in ((f"int{bits}", plain), (f"int{bits}, GPTQ", feedback)):
            stored = bits_of_a_weight(bits, group) / 16
            yield {"method": method, "shape": found.shape, "bytes": stored, **judged(stacks, found, evaluator)}


def coded_rows(config: QualityConfig, evaluator: Evaluator) -> Iterator[dict[str, Any]]:
    """GloBE's coded experts."""
    for bits, (suffix, text) in itertools.product(config.bits, TEXTS.items()):
        yield globe_row(config, evaluator, f"GloBE, coded{suffix}", text, bits=bits)


def add_ratios(rows: list[dict[str, Any]], original: float, dtype: torch.dtype) -> None:
    """Add what does not depend on the machine.

    That is the rise of the perplexity, bytes in units of bfloat16's, given the `dtype` that parameters are stored in,
    and error and time in units of GloBE's.
    """
    globe = {row["keep"]: row for row in rows if row["method"] == "GloBE"}
    for row in rows:
        row["perplexity_rise"] = row["perplexity"] / original - 1
        if "keep" in row:
            row.setdefault("bytes", row["stored"] * dtype.itemsize / torch.bfloat16.itemsize)
            row["error_over_globe"] = row["error"] / globe[row["keep"]]["error"]
            row["seconds_over_globe"] = row["seconds"] / globe[row["keep"]]["seconds"]


def judge_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Perplexity at keep 0.75, and at every budget error and divergence against the best rival's."""
    claims: list[Claim] = []
    for globe in (row for row in rows if row["method"] == "GloBE"):
        keep, rise = globe["keep"], globe["perplexity_rise"]
        if keep == CLAIMED_KEEP:
            statement = f"keep {keep:g}: GloBE's perplexity is within {PERPLEXITY_RISE:.0%} of the original's"
            claims.append(Claim(statement, f"{rise:+.2%}", rise <= PERPLEXITY_RISE))
        rivals = [row for row in rows if row.get("keep") == keep and not row["method"].startswith("GloBE")]
        for key, name in (("error", "error"), ("kl", "KL divergence")):
            best = min(rivals, key=lambda row: row[key])
            measured = (
                f"{globe[key]:.4g} with {globe['stored']:.3f} of the parameters stored; "
                f"{best['method']} {best[key]:.4g} with {best['stored']:.3f}"
            )
            claims.append(
                Claim(f"keep {keep:g}: GloBE's {name} is below every rival's", measured, globe[key] < best[key])
            )
    for globe in (row for row in rows if row["method"].startswith("GloBE, coded")):
        rivals = [row for row in rows if row["method"].startswith("int") and row["bytes"] <= globe["bits"] / 16]
        if rivals:
            best = min(rivals, key=lambda row: row["kl"])
            ratio = globe["kl"] / best["kl"]
            statement = (
                f"{globe['bits']:g} bits, {globe['method']}: KL at most {CLAIMED_RATIO:g} of the better rounding's"
            )
            measured = f"{ratio:.2f}: {globe['kl']:.4g}; {best['method']}, {best['shape']}, {best['kl']:.4g}"
            claims.append(Claim(statement, measured, ratio <= CLAIMED_RATIO))
    return claims


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Divergence against stored bytes, a line for each method."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "bytes" in row:
            method = "rounding, GPTQ" if row["method"].endswith("GPTQ") else row["method"]
            method = "rounding" if method.startswith("int") else method.partition(", R ")[0]
            lines.setdefault(method, []).append((row["bytes"], row["kl"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 5.2), layout="constrained")
        axes = figure.subplots()
        looks = itertools.product(("-", "--", ":"), MARKERS)  # the colours come round as the markers do
        for method, points in sorted(lines.items(), key=lambda line: not line[0].startswith("GloBE")):
            line, marker = next(looks)
            ours = method.startswith("GloBE")
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, line, marker=marker, label=method, linewidth=2.2 if ours else 1, zorder=3 if ours else 2)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="bytes of the experts, share of bfloat16's",
            ylabel="KL to the original, nats per token",
        )
        axes.set_xticks(_TICKS, [f"{tick:.0%}" for tick in _TICKS])
        axes.minorticks_off()
        figure.legend(ncols=4, fontsize=7, loc="outside lower center")
        figure.savefig(path)


def main(config: QualityConfig) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    logging.disable_progress_bar()
    began, console = time.monotonic(), Console()
    model = resolve_model(config.model)
    stacks, dtype = read_stacks(model, config.layers)
    evaluator = Evaluator(model, config.max_tokens)
    rows: list[dict[str, Any]] = [{"method": "original", **evaluator.original()}]
    nothing = {key: torch.zeros_like(stack) for key, stack in stacks.items()}
    rows.append({"method": "without these experts", **evaluator.approximation(nothing, {})})

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        budget = f"keep {row['keep']:g}  " if "keep" in row else ""
        progress = f"{time.monotonic() - began:5.0f} s  {budget}{row['method']}: error {row['error']:.4f}"
        console.print(f"{progress}  perplexity {row['perplexity']:.3f}", highlight=False)

    calibration = None
    if config.rivals == "all":
        calibration = evaluator.calibration(evaluator.split(CALIBRATION, config.calibration_tokens)[0], stacks)
    for keep in config.keeps:
        for row in rows_at(config, keep, stacks, dtype, evaluator):
            add(row)
        if calibration is not None:
            for suffix, text in list(TEXTS.items())[1:]:
                add(globe_row(config, evaluator, f"GloBE{suffix}", text, keep=keep))
            for row in more_rows_at(config, keep, stacks, dtype, calibration, evaluator):
                add(row)
    if calibration is not None:
        for row in coded_rows(config, evaluator):
            add(row)
        for row in rounding_rows(stacks, calibration, evaluator):
            add(row)
    add_ratios(rows, rows[0]["perplexity"], dtype)
    claims = judge_claims(rows)
    title = f"Quality of {Path(model).name} on {config.max_tokens} held-out tokens, {config.threads} threads"
    print_table(title, rows, COLUMNS if calibration is None else ALL_COLUMNS)
    print_claims(claims)
    output = config.output or RESULTS / ("quality.json" if calibration is None else "quality_all.json")
    write_record(output, "quality", config, rows, claims)
    draw(output.with_suffix(".png"), rows)


if __name__ == "__main__":
    main(tyro.cli(QualityConfig, description=__doc__))
