"""What a fit costs as the problem grows: peak memory in units of the experts' own bytes (of a part's, when
streamed), and time in E, D and scopes.

    python -m benchmarks.scaling

Memory is the growth of a fresh process's largest resident size over what it is after a tiny fit, so that imports and
libraries do not count; the experts themselves do. Time is per step, steps being all of a fit that is repeated.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.tables import Column, print_claims, print_table
from globe import FitConfig, fit_bank
from globe.bank.objective import Problem
from globe.machine.memory import peak_memory
from globe.train.stream import ExpertParts, fit_parts

COLUMNS = (
    Column("what", "what"),
    Column("shape", "E x P x D"),
    Column("rank", "R", "d"),
    Column("num_bases", "M", "d"),
    Column("memory", "peak memory / experts or part", ".2f"),
    Column("seconds", "seconds a step", ".4f"),
    Column("growth", "time over size", ".2f"),
)


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """What is measured."""

    memory_shape: tuple[int, int, int] = (64, 768, 2048)
    """E, P and D of the fit whose memory is measured."""
    part_shape: tuple[int, int, int] = (16, 192, 2048)
    """E, P and D of a part of a streamed fit, to 2, 4 and 8 parts."""
    time_shape: tuple[int, int, int] = (32, 192, 512)
    """E, P and D of the smallest fit that is timed; E, D and the number of fits are doubled twice."""
    basis_ratio: float = 0.375
    """M over E; R = P."""
    bases: int = 12
    """M of the fits that are timed, the same for every size: a step costs E·M·R·D."""
    steps: int = 8
    """Steps of a fit that is timed."""
    seed: int = 0
    """Seeds the experts."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "scaling.json"
    """Where the record is written."""


def random_experts(shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def peak_of_fit(shape: tuple[int, int, int], num_bases: int, seed: int, threads: int) -> float:
    """Peak memory of a fit over the bytes of its experts; to be called in a process of its own."""
    torch.set_num_threads(threads)
    fit_bank(random_experts((8, 16, 32), seed), FitConfig(rank=16, num_bases=4, align_steps=2, max_steps=2))
    before = peak_memory()
    experts = random_experts(shape, seed)
    fit_bank(experts, FitConfig(rank=shape[1], num_bases=num_bases, align_steps=2, max_steps=2))
    return (peak_memory() - before) / experts.nbytes


def peak_of_stream(num_parts: int, config: ScalingConfig) -> float:
    """Peak memory of a streamed fit to `num_parts` parts, over the bytes of one; in a process of its own."""
    torch.set_num_threads(config.threads)
    size, rows, columns = config.part_shape

    def run(num_parts: int, size: int, rows: int, columns: int, num_bases: int) -> None:
        parts = ExpertParts(
            [size] * num_parts, rows, columns, lambda index: Problem(random_experts((size, rows, columns), index))
        )
        fit_parts(parts, FitConfig(rank=rows, num_bases=num_bases, align_steps=2, max_steps=2))

    run(2, 8, 16, 32, 4)
    before = peak_memory()
    run(num_parts, size, rows, columns, config.bases)
    return (peak_memory() - before) / (4 * size * rows * columns)


def step_seconds(shape: tuple[int, int, int], config: ScalingConfig) -> float:
    """Median seconds of a step of varpro."""
    moments: list[float] = []
    fit = FitConfig(rank=shape[1], num_bases=config.bases, align_steps=1, max_steps=config.steps)
    fit_bank(random_experts(shape, config.seed), fit, lambda _: moments.append(time.perf_counter()))
    return statistics.median(after - before for before, after in itertools.pairwise(moments))


def main(config: ScalingConfig) -> None:
    torch.set_num_threads(config.threads)
    num_bases = round(config.basis_ratio * config.memory_shape[0])
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as pool:
        memory = pool.submit(peak_of_fit, config.memory_shape, num_bases, config.seed, config.threads).result()
        streams = {parts: pool.submit(peak_of_stream, parts, config).result() for parts in (2, 4, 8)}
    rows: list[dict[str, Any]] = [
        {
            "what": "memory",
            "shape": " x ".join(map(str, config.memory_shape)),
            "rank": config.memory_shape[1],
            "num_bases": num_bases,
            "memory": memory,
        }
    ]
    rows += [
        {
            "what": f"memory, {parts} parts streamed",
            "shape": " x ".join(map(str, config.part_shape)),
            "rank": config.part_shape[1],
            "num_bases": config.bases,
            "memory": peak,
        }
        for parts, peak in streams.items()
    ]
    num_memory_rows = len(rows)
    num_experts, height, width = config.time_shape
    cases = [(name, factor) for name in ("E", "D", "scopes") for factor in (1, 2, 4)]
    for name, factor in cases:
        shape = (num_experts * (factor if name == "E" else 1), height, width * (factor if name == "D" else 1))
        seconds = sum(step_seconds(shape, config) for _ in range(factor if name == "scopes" else 1))
        first = seconds if factor == 1 else rows[-1]["first"]
        rows.append(
            {
                "what": f"time in {name}",
                "shape": " x ".join(map(str, shape)) + (f", {factor} fits" if name == "scopes" else ""),
                "rank": height,
                "num_bases": config.bases,
                "seconds": seconds,
                "first": first,
                "growth": seconds / first / factor,
            }
        )
    claims = [
        Claim("peak memory of a fit is under 3 times its experts' bytes", f"{memory:.2f}", memory < 3),
        Claim(
            "peak memory of a streamed fit does not grow with its parts",
            f"{streams[8] / streams[2]:.2f} at 4 times the parts",
            streams[8] < 1.1 * streams[2],
        ),
        *(
            Claim(f"time is linear in {name}", f"{row['growth']:.2f} at 4 times the size", row["growth"] < 1.2)
            for name, row in zip(("E", "D", "scopes"), rows[num_memory_rows + 2 :: 3], strict=True)
        ),
    ]
    print_table(f"How a fit scales, {config.threads} threads", rows, COLUMNS)
    print_claims(claims)
    write_record(config.output, "scaling", config, rows, claims)


if __name__ == "__main__":
    main(tyro.cli(ScalingConfig, description=__doc__))
