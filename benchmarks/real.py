"""GloBE in few bits against GPTQ, QTIP, WaterSIC and BitsMoE on a language model that nobody here trained.

    python -m benchmarks.real [--model smollm2 | upcycled | shipped] [--layers 4 14 24]

`smollm2` is SmolLM2-135M-Instruct as a mixture (`scripts/smollm2_as_mixture.py`), `upcycled` a small one whose experts
began as copies (`scripts/train_upcycled_model.py`); `make real` writes both to runs/. Everything is calibrated on the
same tokens of python_library.txt, GloBE also on samples of the model itself, its default, and on the mixture that
ships. GloBE goes the whole way: compressed to a directory and loaded from it. Judged is the KL divergence from the
original in nats per token, in float32, on the shipped held-out split, which is Python source code, and on English prose
that every Python brings: its documentation topics (`pydoc_data.topics`; the two small models were trained on these,
SmolLM2 on who knows what). Bits are stored bits per weight of the experts, everything counted; those of WaterSIC are an
entropy, and "BitsMoE, free basis" leaves its bases out of the count.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal, get_args
from unittest import mock

import torch
import tyro
from rich.console import Console
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.calibration import CALIBRATION, Calibration, calibrate
from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.rivals.bitsmoe import bitsmoe
from benchmarks.rivals.gptq import gptq
from benchmarks.rivals.qtip import qtip
from benchmarks.rivals.rounding import bits_of_a_weight
from benchmarks.rivals.watersic import watersic
from benchmarks.stacks import Approximation, Stacks, family_errors, read_stacks, write_stacks
from benchmarks.tables import Column, print_claims, print_table
from globe import CompressConfig, EvaluateConfig, compress
from globe.checkpoint.files import read_json
from globe.checkpoint.shipped import resolve_model
from globe.errors import SettingsError
from globe.measure.evaluate import token_windows
from globe.measure.texts import read_text
from globe.run import prepare
from globe.run.job import Job
from globe.run.observer import Observer

NAMED = {"smollm2": Path("runs/smollm2-moe"), "upcycled": Path("runs/upcycled-moe")}
PROSE = "topics"
ROUNDED = "rounded.json"
"""What another package says of a model that it rounded: method, bits, shape, seconds."""
Method = Literal[
    "GloBE",
    "GloBE, no bank",
    "GloBE, uncompensated",
    "GloBE, samples",
    "GloBE, mixture",
    "GPTQ",
    "QTIP",
    "WaterSIC",
    "BitsMoE",
    "BitsMoE, free basis",
]
METHODS: tuple[Method, ...] = get_args(Method)
BANKLESS = "GloBE, no bank"
"""The same budget, all of it for what experts do not share; not run where GloBE finds no bank worth its bytes."""
UNCOMPENSATED = "GloBE, uncompensated"
"""The same budget, no layer making up for the errors of those before it."""
MIXTURE = "GloBE, mixture"
"""Calibrated on another text than the rivals, of which one text in twenty is Python."""
GLOBE: dict[str, str] = {
    "GloBE": CALIBRATION,
    BANKLESS: CALIBRATION,
    UNCOMPENSATED: CALIBRATION,
    "GloBE, samples": "samples",
    MIXTURE: "calibration",
}
"""What GloBE is calibrated on."""
AT_EQUAL_BITS: dict[str, Callable[[Stacks, float, Calibration], Approximation]] = {
    "QTIP": qtip,
    "WaterSIC": watersic,
    "BitsMoE": bitsmoe,
    "BitsMoE, free basis": lambda stacks, bits, calibration: bitsmoe(stacks, bits, calibration, count_basis=False),
}
"""Rivals that take a budget of bits."""
CLAIMED_OF_EQUAL = {4.0: 0.9, 3.0: 0.85, 2.5: 0.85, 2.0: 0.8}
"""KL of GloBE over the best rival's at equal bits, at most."""
CLAIMED_OF_GPTQ = {4.0: 0.45, 3.0: 0.6, 2.5: 0.5, 2.0: 0.5}
"""KL of GloBE over that of the best GPTQ of no fewer bits, but for REACH, at most."""
CLAIMED_OF_BANKLESS = {4.0: 0.8, 3.0: 0.75, 2.5: 0.7, 2.0: 0.7}
"""KL of GloBE over its own without a bank, at most, where experts began as copies."""
REACH = 0.5
"""Bits that GPTQ may have more than GloBE where they are compared."""


@dataclasses.dataclass(frozen=True)
class RealConfig:
    """What is compared."""

    model: str = "smollm2"
    """`smollm2`, `upcycled`, `shipped`, a local directory or a Hub id."""
    methods: tuple[Method, ...] = METHODS
    """Methods to run."""
    bits: tuple[float, ...] = (4.0, 3.0, 2.5, 2.0)
    """Budgets of all methods but GPTQ."""
    more_bits: tuple[float, ...] = (8.0, 6.0, 5.0)
    """Further budgets of GloBE, for GPTQ's other ones."""
    roundings: tuple[tuple[int, int], ...] = (
        (7, 32),
        (5, 32),
        (4, 32),
        (4, 96),
        (4, 128),
        (3, 32),
        (3, 96),
        (3, 128),
        (2, 32),
        (2, 64),
        (2, 128),
        (2, 192),
    )
    """GPTQ's bits and weights in a group; groups that do not divide the hidden size are left out."""
    texts: tuple[str, ...] = ("heldout", PROSE)
    """What is predicted: a shipped split, `topics` or a file."""
    max_tokens: int = 4096
    """Tokens predicted of each text."""
    calibration_tokens: int = 16384
    """Tokens of the calibration split that are seen."""
    layers: tuple[int, ...] | None = None
    """Layers to compress; None: all."""
    rounded: tuple[Path, ...] = ()
    """Directories with the same model rounded by another package, and what it says of that in rounded.json."""
    seed: int = 0
    """Seeds what is random."""
    threads: int = 1
    """CPU threads."""
    add: bool = False
    """Keep what the record says of methods that are not run, if it was made with the same settings."""
    output: Path | None = None
    """Where the record is written; None: real.json in the results, or real_MODEL.json for other models than smollm2."""

    @property
    def record(self) -> Path:
        """Where the record is written."""
        return self.output or RESULTS / (
            "real.json" if self.model == "smollm2" else f"real_{Path(self.model).name}.json"
        )


def kept_rows(config: RealConfig) -> list[dict[str, Any]]:
    """Rows of the record, made with the same settings, of methods that are not run."""
    record = read_json(config.record)
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    for name in ("model", "texts", "max_tokens", "calibration_tokens", "layers", "seed"):
        if record["settings"][name] != settings[name]:
            raise SystemExit(f"{config.record} was made with {name} {record['settings'][name]}, not {settings[name]}")
    run = {*config.methods, "original", *(read_json(folder / ROUNDED)["method"] for folder in config.rounded)}
    return [row for row in record["rows"] if row["method"] not in run]


class Judge:
    """Models judged on the same tokens against the same original, in float32."""

    def __init__(self, model: str | Path, texts: Sequence[str], max_tokens: int) -> None:
        self.original: Any = _load(model)
        self._tokenizer = AutoTokenizer.from_pretrained(str(model))
        self.windows = {text: self.split(text, max_tokens) for text in texts}
        self._log_q = {text: [*_log_probabilities(self.original, ids)] for text, ids in self.windows.items()}

    def split(self, text: str, max_tokens: int) -> torch.Tensor:
        """Token windows (N, length) from the beginning of a text."""
        words = "\n\n".join(topics.values()) if text == PROSE else read_text(text)
        return token_windows(self._tokenizer, words, EvaluateConfig(max_tokens=max_tokens))[0]

    def decode(self, windows: torch.Tensor) -> str:
        """The text of token windows."""
        return self._tokenizer.decode(windows.flatten())

    def __call__(self, model: Any) -> dict[str, float]:
        """KL divergence with its standard error over windows, perplexity and agreement, for each text."""
        found: dict[str, float] = {}
        for text, windows in self.windows.items():
            divergences, agreed, nats = list[float](), 0.0, 0.0
            for ids, log_q, log_p in zip(windows, self._log_q[text], _log_probabilities(model, windows), strict=True):
                divergences.append(float(functional.kl_div(log_p, log_q, reduction="sum", log_target=True)))
                agreed += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
                nats += float(functional.nll_loss(log_p, ids[1:], reduction="sum"))
            length = windows.shape[1] - 1
            kls = torch.tensor(divergences, dtype=torch.float64) / length
            found |= {
                f"kl_{text}": float(kls.mean()),
                f"kl_error_{text}": float(kls.std() / math.sqrt(len(kls))) if len(kls) > 1 else math.nan,
                f"perplexity_{text}": math.exp(nats / (len(windows) * length)),
                f"agreement_{text}": agreed / (len(windows) * length),
            }
        return found


@torch.no_grad()
def _log_probabilities(model: Any, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of the next token, (length − 1, vocabulary), for each of the windows (N, length)."""
    for ids in windows:
        yield model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)


def _load(model: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()


_CALIBRATIONS: dict[str, prepare.Calibration] = {}
"""By what GloBE was calibrated on: it is the same for all budgets."""


@contextlib.contextmanager
def calibrated_once() -> Iterator[None]:
    """Within it, GloBE takes up the calibration of an earlier budget, and the seconds that it took."""
    measure = prepare.run_all

    def run_all(job: Job, watch: Observer, *_: object) -> prepare.Calibration:
        name = job.config.calibrate
        if name not in _CALIBRATIONS:
            _CALIBRATIONS[name] = measure(job, watch)
        return _CALIBRATIONS[name]

    with mock.patch.object(prepare, "run_all", run_all):
        yield


def globe_row(config: RealConfig, model: str | Path, judge: Judge, method: str, bits: float) -> dict[str, Any]:
    """GloBE within a budget: compressed to a directory, loaded from it and judged."""
    settings = CompressConfig(
        bits=bits,
        calibrate=GLOBE[method],
        calibration_tokens=config.calibration_tokens,
        layers=config.layers,
        seed=config.seed,
    )
    without = {
        BANKLESS: mock.patch("globe.run.coding.ExpertFamily.find_bank", return_value=None),
        UNCOMPENSATED: mock.patch("globe.run.compress.begin_compensation", return_value=(None, "it is left out")),
    }
    with tempfile.TemporaryDirectory() as folder:
        with calibrated_once(), without.get(method, contextlib.nullcontext()):
            report = compress(model, Path(folder) / "compressed", settings)
        quality = judge(_load(Path(folder) / "compressed"))
    return {
        "method": method,
        "asked": bits,
        "bits": report.bits,
        "shape": "",
        "bank_share": sum(part.bank_bytes for part in report.coded) / sum(part.stored_bytes for part in report.coded),
        "predicted_kl": report.predicted_kl,
        "error": report.error,
        **report.family_errors(),
        **quality,
        "coding_seconds": sum(part.seconds for part in report.coded),
        "seconds": report.seconds,
    }


def rival_rows(config: RealConfig, stacks: Stacks, calibration: Calibration, judge: Judge) -> Iterator[dict[str, Any]]:
    """The rivals, each judged; the calibration counts to their time."""
    model = copy.deepcopy(judge.original)

    def row(method: str, found: Approximation, bits: float, **more: float) -> dict[str, Any]:
        write_stacks(model, found.stacks)
        return {
            "method": method,
            **more,
            "bits": bits,
            "shape": found.shape,
            **family_errors(stacks, found.stacks),
            **judge(model),
            "coding_seconds": found.seconds,
            "seconds": found.seconds + calibration.seconds,
        }

    columns = next(iter(stacks.values())).shape[2]
    for bits, group in config.roundings if "GPTQ" in config.methods else ():
        if columns % group == 0:
            found = gptq(stacks, bits, calibration, group)
            shape = f"int{bits}, {found.shape}"
            yield row("GPTQ", dataclasses.replace(found, shape=shape), bits_of_a_weight(bits, group))
    for method, rival in AT_EQUAL_BITS.items():
        for bits in config.bits if method in config.methods else ():
            try:
                found = rival(stacks, bits, calibration)
            except SettingsError as error:  # a budget that the method has no form for
                Console().print(f"{method} at {bits:g} bits: {error}", highlight=False)
                continue
            assert found.bits is not None
            yield row(method, found, found.bits, asked=bits)


def rounded_row(folder: Path, judge: Judge, stacks: Stacks) -> dict[str, Any]:
    """The model as another package rounded it."""
    told = read_json(folder / ROUNDED)
    found, _ = read_stacks(folder, {layer for layer, _ in stacks})
    return {**told, **family_errors(stacks, found), **judge(_load(folder)), "coding_seconds": told["seconds"]}


def judge_claims(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[Claim]:
    """GloBE against the best rival at equal bits, against GPTQ at hardly more, and never worse than GPTQ."""
    claims: list[Claim] = []
    by_gptq = [row for row in rows if row["method"] == "GPTQ"]
    for text, method in (
        (text, method) for text in texts for method in GLOBE if method not in (BANKLESS, UNCOMPENSATED, MIXTURE)
    ):
        key, worst = f"kl_{text}", list[tuple[float, str]]()
        for globe in (row for row in rows if row["method"] == method):
            asked = globe["asked"]
            equal = [row for row in rows if row["method"] in AT_EQUAL_BITS and row["asked"] == asked]
            more = [row for row in by_gptq if asked <= row["bits"] <= asked + REACH]
            bankless = [row for row in rows if row["method"] == BANKLESS and row["asked"] == asked]
            for name, rivals, claimed in (
                ("the best of QTIP, WaterSIC and BitsMoE", equal, CLAIMED_OF_EQUAL),
                (f"the best GPTQ with up to {asked + REACH:g} bits", more, CLAIMED_OF_GPTQ),
                ("itself without a bank", bankless if method == "GloBE" else [], CLAIMED_OF_BANKLESS),
            ):
                if rivals:
                    ratio, measured = _compare(globe, rivals, key)
                    most = claimed.get(asked, 1.0)
                    statement = f"{text}, {method}, {asked:g} bits: KL at most {most:g} of {name}"
                    claims.append(Claim(statement, measured, ratio <= most))
            worst += [_compare(globe, [row], key) for row in more]
        if worst:
            ratio, measured = max(worst)
            statement = f"{text}, {method}: nowhere more KL than GPTQ has with up to {REACH:g} bits more"
            claims.append(Claim(statement, measured, ratio <= 1))
    return claims


def _compare(globe: dict[str, Any], rivals: Sequence[dict[str, Any]], key: str) -> tuple[float, str]:
    """KL over the best rival's, and the two in words."""
    best = min(rivals, key=lambda row: row[key])
    theirs = f"{best['method']} {best[key]:.4g} with {best['bits']:.3f} bits"
    return globe[key] / best[key], f"{globe[key] / best[key]:.3f}: {globe[key]:.4g} with {globe['bits']:.3f}; {theirs}"


def columns(texts: Sequence[str]) -> list[Column]:
    return [
        Column("method", "method"),
        Column("shape", "shape"),
        Column("bits", "bits", ".3f"),
        *(Column(f"kl_{text}", f"KL {Path(text).name}", ".5f") for text in texts),
        Column("predicted_kl", "predicted", ".5f"),
        *(Column(f"kl_error_{text}", "±", ".5f") for text in texts),
        *(Column(f"agreement_{text}", "agree", ".2%") for text in texts),
        Column("error", "error", ".4f"),
        Column("gate", "gate", ".4f"),
        Column("up", "up", ".4f"),
        Column("down", "down", ".4f"),
        Column("coding_seconds", "coding s", ".0f"),
        Column("seconds", "all s", ".0f"),
    ]


def main(config: RealConfig) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    logging.disable_progress_bar()
    began, console = time.monotonic(), Console()
    model = NAMED.get(config.model) or resolve_model(config.model)
    if model in NAMED.values() and not Path(model).exists():
        raise SystemExit(f"{model} is not there: `make real` writes it")
    judge = Judge(model, config.texts, config.max_tokens)
    original = {f"perplexity_{text}": value for text, value in _perplexities(judge).items()}
    rows: list[dict[str, Any]] = [{"method": "original", "bits": 16.0, **original}]
    rows += kept_rows(config) if config.add else []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        kls = "  ".join(f"{text} {row[f'kl_{text}']:.5f}" for text in config.texts)
        head = f"{time.monotonic() - began:6.0f} s  {row['method']} {row['bits']:.3f} bits {row['shape']}"
        console.print(f"{head}: KL {kls}  ({row['coding_seconds']:.0f} s)", highlight=False, soft_wrap=True)
        write_record(config.record, "real", config, rows, judge_claims(rows, config.texts))
        gc.collect()

    if set(config.methods) - set(GLOBE):
        stacks, _ = read_stacks(model, config.layers)
        tokens = judge.split(CALIBRATION, config.calibration_tokens)
        calibration = calibrate(judge.original, tokens, {layer for layer, _ in stacks})
        console.print(f"calibrated on {calibration.num_tokens} tokens in {calibration.seconds:.0f} s", highlight=False)
        for row in rival_rows(config, stacks, calibration, judge):
            add(row)
    for folder in config.rounded:
        add(rounded_row(folder, judge, read_stacks(model, config.layers)[0]))
    for method in (method for method in config.methods if method in GLOBE):
        for bits in (*config.bits, *(config.more_bits if method == "GloBE" else ())):
            if method == BANKLESS and not any(row.get("bank_share") for row in rows if row.get("asked") == bits):
                continue
            add(globe_row(config, model, judge, method, bits))
    rows[1:] = sorted(rows[1:], key=lambda row: (-row["bits"], row["method"]))
    claims = judge_claims(rows, config.texts)
    write_record(config.record, "real", config, rows, claims)
    print_table(f"{Path(str(model)).name}, {config.max_tokens} tokens of each text", rows, columns(config.texts))
    print_claims(claims)


def _perplexities(judge: Judge) -> dict[str, float]:
    found = judge(judge.original)
    return {text: found[f"perplexity_{text}"] for text in judge.windows}


if __name__ == "__main__":
    main(tyro.cli(RealConfig, description=__doc__))
