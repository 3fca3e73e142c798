"""How long coding takes, and how near it comes to the limit.

    python -m benchmarks.coding

Random experts of normal entries, whose inputs have a second moment with eigenvalues over two decades, are coded at a
few budgets. `loss` is the weighted error over that of nothing, `limit` what reverse water-filling over the same costs
would leave with an ideal coder at the same bits of paths. Seconds are those of rehearsal, coding and decoding.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.record import RESULTS, write_record
from benchmarks.tables import Column, print_table
from globe.experts.coding import CodingProblem
from globe.quant.feedback import order_inputs
from globe.quant.outputs import fit_outputs
from globe.quant.water_fill import water_fill

COLUMNS = (
    Column("shape", "E x N x K"),
    Column("bits", "bits", ".3f"),
    Column("side", "widths, scales", ".4f"),
    Column("loss", "loss", ".5f"),
    Column("limit", "limit", ".5f"),
    Column("ratio", "over limit", ".3f"),
    Column("order", "order, s", ".1f"),
    Column("rehearse", "rehearse, s", ".1f"),
    Column("code", "code, s", ".1f"),
    Column("decode", "decode, s", ".2f"),
    Column("microseconds", "µs a weight", ".3f"),
    Column("hours", "Qwen3-30B-A3B, h", ".1f"),
)
QWEN3_30B = 48 * 128 * 3 * 768 * 2048
"""Weights of the routed experts of Qwen3-30B-A3B."""


@dataclasses.dataclass(frozen=True)
class CodingConfig:
    """What is coded."""

    shapes: tuple[tuple[int, int, int], ...] = ((8, 2048, 768), (16, 128, 48))
    """Experts, inputs and outputs: of the first shape as in Qwen3-30B-A3B, fewer experts, for time grows with them."""
    bits: tuple[float, ...] = (2.0, 3.0, 4.0)
    """Budgets, everything counted."""
    seed: int = 0
    """Seeds the experts."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "coding.json"
    """Where the record is written."""


def problem(shape: tuple[int, int, int], seed: int) -> CodingProblem:
    """Random experts, half of which matter a tenth of the others, and their inputs."""
    E, N, K = shape
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(E, N, K, generator=generator)
    half = torch.randn(N, 2 * N, generator=generator) * torch.logspace(0, -1, N)[:, None]
    C = half @ half.mT
    C = C / C.diagonal().mean() + 0.05 * torch.eye(N)
    importance = torch.where(torch.arange(E) % 2 == 0, 1.0, 0.1) / (N * K)
    of_outputs = importance[:, None].expand(E, K)
    return CodingProblem(X, order_inputs(C[None]), of_outputs, C, 1.0, fit_outputs(X.square().mean(1), N, of_outputs))


def limit(costs: Tensor, bits: float) -> float:
    """Σ min(θ, c) at the θ at which Σ max(0, ½ log₂(c / θ)) takes `bits` on average: reverse water-filling."""
    low, high = float(costs.min().log2()) - 40, float(costs.max().log2())
    for _ in range(100):
        middle = (low + high) / 2
        rate = float((costs.log2() - middle).clamp_min(0).mean()) / 2
        low, high = (middle, high) if rate > bits else (low, middle)
    return float(costs.clamp_max(2.0**high).sum())


def row(shape: tuple[int, int, int], bits: float, seed: int) -> dict[str, Any]:
    """Code one stack within a budget."""
    E, N, K = shape
    began = time.perf_counter()
    whole = problem(shape, seed)
    ordered = time.perf_counter()
    budget = int(bits * E * N * K / 8) - whole.side_bytes
    first = water_fill([whole.rows()], budget).multiplier
    rehearsed = whole.rehearsed(first)
    filled = water_fill([rehearsed.rows()], budget)
    ready = time.perf_counter()
    coded, _ = rehearsed.code(filled.multiplier)
    done = time.perf_counter()
    decoded = coded.decode()
    ended = time.perf_counter()
    missed = whole.X - decoded
    loss, none = (float((((whole.second_moment @ x) * x).sum(1) * whole.importance).sum()) for x in (missed, whole.X))
    prices = torch.empty_like(whole.order.prices).scatter_(1, whole.order.inputs, whole.order.prices)
    costs = (whole.row_importance[:, None] * prices * whole.mean_squares).double()
    path_bits = 8 * coded.payload.numel() / whole.X.numel()
    least = limit(costs, path_bits) * K / none
    microseconds = 1e6 * (done - ordered) / whole.X.numel()
    return {
        "shape": f"{E} x {N} x {K}",
        "bits": 8 * coded.num_bytes / whole.X.numel(),
        "side": 8 * whole.side_bytes / whole.X.numel(),
        "loss": loss / none,
        "limit": least,
        "ratio": loss / none / least,
        "order": ordered - began,
        "rehearse": ready - ordered,
        "code": done - ready,
        "decode": ended - done,
        "microseconds": microseconds,
        "hours": microseconds * QWEN3_30B / 3.6e9 if math.prod(shape) > 10**7 else None,
    }


def main() -> None:
    config = tyro.cli(CodingConfig, description=__doc__)
    torch.set_num_threads(config.threads)
    warm = (2, 16, 64)
    for bits in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):  # compiles the search
        row(warm, bits + 0.2, config.seed)
    rows = [row(shape, bits, config.seed) for shape in config.shapes for bits in config.bits]
    print_table("coding", rows, COLUMNS)
    write_record(config.output, "coding", config, rows, [])


if __name__ == "__main__":
    main()
