"""How much batching and solving save over the naive step, and how near a fit comes to the machine's rate.

    python -m benchmarks.speed

The seed documents claim: a bank update 20 to 30 % faster with a solve than with an inverse, adapters refitted 5 to 10
times faster batched than one by one with a pseudoinverse, a whole step 2 to 3 times faster. The two of a pair are timed
in turns, after a warm-up, on random experts, and their medians compared; `difference` is between their results.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.naive import adapters_by_pinv, directions_by_inverse, naive_step
from benchmarks.record import RESULTS, Claim, write_record
from benchmarks.tables import Column, print_claims, print_table
from globe.bank.activations import activate
from globe.bank.adapters import refit_adapters
from globe.bank.bases import optimal_directions
from globe.bank.factors import mix
from globe.bank.objective import Problem, objective
from globe.bank.targets import wanted_features, weight_aware_targets
from globe.init.init_bank import am_step
from globe.train.parts import ExpertParts
from globe.train.varpro import VariableProjection

ACTIVATION, ACTIVATION_LAMBDA = "silu", 0.5
COLUMNS = (
    Column("shape", "E x P x D"),
    Column("what", "what"),
    Column("naive_seconds", "naive, s", ".4f"),
    Column("globe_seconds", "GloBE, s", ".4f"),
    Column("speed_up", "speed-up", ".2f"),
    Column("difference", "difference", ".1e"),
    Column("claimed", "claimed"),
)
RATE_COLUMNS = (
    Column("shape", "E x P x D"),
    Column("gflops", "GFLOP", ".1f"),
    Column("step_rate", "varpro step, GFLOP/s", ".1f"),
    Column("matmul_rate", "torch.matmul, GFLOP/s", ".1f"),
    Column("rate", "rate / matmul", ".2f"),
)


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """What is timed."""

    shapes: tuple[tuple[int, int, int], ...] = ((60, 352, 512), (64, 768, 2048))
    """E, P and D of each case."""
    rank_ratio: float = 0.75
    """R / P."""
    basis_ratio: float = 0.5
    """M / E."""
    repeats: int = 3
    """Times that each is run after the warm-up."""
    seed: int = 0
    """Seeds the experts and factors."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "speed.json"
    """Where the record is written."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Random experts and factors of one shape."""

    weights: Tensor
    """W, (E, P, D)."""
    codes: Tensor
    """a, (E, M)."""
    bases: Tensor
    """B, (M, R, D)."""
    adapters: Tensor
    """A, (E, P, R), fitted to the weights."""

    @property
    def name(self) -> str:
        return " x ".join(map(str, self.weights.shape))

    @property
    def features(self) -> Tensor:
        return activate(mix(self.codes, self.bases), ACTIVATION, ACTIVATION_LAMBDA)


def make_case(shape: tuple[int, int, int], config: SpeedConfig) -> Case:
    """Experts that a bank of the case's shape explains in part."""
    num_experts, rows, columns = shape
    rank, num_bases = round(config.rank_ratio * rows), round(config.basis_ratio * num_experts)
    generator = torch.Generator().manual_seed(config.seed)
    codes = torch.randn(num_experts, num_bases, generator=generator) / num_bases**0.5
    bases = torch.randn(num_bases, rank, columns, generator=generator)
    weights = torch.randn(num_experts, rows, columns, generator=generator)
    adapters = torch.randn(num_experts, rows, rank, generator=generator) / rank**0.5
    weights.baddbmm_(adapters, activate(mix(codes, bases), ACTIVATION, ACTIVATION_LAMBDA))
    start = Case(weights, codes, bases, adapters)
    return dataclasses.replace(start, adapters=refit_adapters(weights, start.features)[0])


def medians(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function over `repeats` rounds in turns, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def compare(case: Case, what: str, naive: Callable[[], Any], globe: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """The two functions timed in turns."""
    found = medians({"naive": naive, "globe": globe}, repeats)
    return {
        "shape": case.name,
        "what": what,
        "naive_seconds": found["naive"],
        "globe_seconds": found["globe"],
        "speed_up": found["naive"] / found["globe"],
    }


def compare_bank(case: Case, repeats: int) -> dict[str, Any]:
    """The bank update by a solve against that by an inverse."""
    mixed = mix(case.codes, case.bases)
    wanted = wanted_features(case.weights, case.adapters)
    targets = weight_aware_targets(wanted, mixed, ACTIVATION, ACTIVATION_LAMBDA)
    row = compare(
        case,
        "bank: solve for inverse",
        lambda: directions_by_inverse(case.codes, targets),
        lambda: optimal_directions(case.codes, targets),
        repeats,
    )
    difference = distance(optimal_directions(case.codes, targets)[0], directions_by_inverse(case.codes, targets))
    return {**row, "difference": difference, "claimed": "1.2 to 1.3"}


def compare_adapters(case: Case, repeats: int) -> dict[str, Any]:
    """Adapters of all experts at once against one pseudoinverse after the other."""
    features = case.features
    row = compare(
        case,
        "adapters: batched Cholesky for pinv",
        lambda: adapters_by_pinv(case.weights, features),
        lambda: refit_adapters(case.weights, features),
        repeats,
    )
    difference = distance(refit_adapters(case.weights, features)[0], adapters_by_pinv(case.weights, features))
    return {**row, "difference": difference, "claimed": "5 to 10"}


def compare_step(case: Case, repeats: int) -> dict[str, Any]:
    """The whole step, which also evaluates the objective twice, against the naive one, which does not."""
    problem, targets = Problem(case.weights), mix(case.codes, case.bases)
    last: dict[str, Any] = {}

    def naive() -> None:
        last["naive"] = naive_step(case.weights, case.adapters, case.codes, case.bases, ACTIVATION, ACTIVATION_LAMBDA)

    def globe() -> None:
        last["globe"] = am_step(
            problem,
            case.adapters,
            case.codes,
            case.bases,
            targets,
            activation=ACTIVATION,
            activation_lambda=ACTIVATION_LAMBDA,
            route_beta=1.0,
            use_weight_aware_targets=True,
        )

    row = compare(case, "whole step", naive, globe, repeats)
    wanted = objective(problem, *last["naive"], ACTIVATION, ACTIVATION_LAMBDA)
    difference = abs(last["globe"].candidate_objective - wanted) / wanted
    return {**row, "difference": difference, "claimed": "2 to 3"}


def distance(x: Tensor, y: Tensor) -> float:
    """‖x − y‖ / ‖y‖."""
    return float((x - y).norm() / y.norm())


def step_flops(case: Case) -> float:
    """Floating-point operations of one varpro step: mixing and its two gradients, Gram matrix, cross product and solve,
    residual, gradient of the mixtures."""
    num_experts, rows, columns = case.weights.shape
    num_bases, rank, _ = case.bases.shape
    mixing = 3 * num_experts * num_bases * rank * columns
    products = num_experts * rank * columns * (rank + 3 * rows)
    solving = num_experts * rank**2 * (rank / 6 + rows)
    return 2.0 * (mixing + products + solving)


def fit_rate(case: Case, repeats: int) -> dict[str, Any]:
    """The rate of varpro's step beside that of torch.matmul on the product A φ(T)."""
    parts, start = ExpertParts.in_memory(Problem(case.weights)), (case.codes.clone(), case.bases.clone())
    solver = VariableProjection(parts, *start, "tanh", "ridge", 0.5, 1.0, energy=parts.energy())
    solver.evaluate()

    def step() -> None:
        solver.move(0.01, 1.0)
        solver.evaluate()

    features = case.features
    found = medians({"step": step, "matmul": lambda: torch.matmul(case.adapters, features)}, repeats)
    flops = step_flops(case)
    step_rate = flops / found["step"] / 1e9
    matmul_rate = 2.0 * case.adapters.numel() * case.weights.shape[2] / found["matmul"] / 1e9
    return {
        "shape": case.name,
        "what": "rate",
        "gflops": flops / 1e9,
        "step_rate": step_rate,
        "matmul_rate": matmul_rate,
        "rate": step_rate / matmul_rate,
    }


def judge_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """A claim holds where the measured speed-up reaches the lower end of what is claimed."""
    return [
        Claim(
            f"{row['shape']}: {row['what']} is {row['claimed']} times as fast",
            f"{row['speed_up']:.2f}",
            row["speed_up"] >= float(row["claimed"].split()[0]),
        )
        for row in rows
        if "claimed" in row
    ]


@torch.no_grad()
def main(config: SpeedConfig) -> None:
    torch.set_num_threads(config.threads)
    rows: list[dict[str, Any]] = []
    for shape in config.shapes:
        case = make_case(shape, config)
        rows += [measure(case, config.repeats) for measure in (compare_bank, compare_adapters, compare_step, fit_rate)]
    claims = judge_claims(rows)
    title = f"Speed, {config.threads} threads, median of {config.repeats}"
    print_table(title, [row for row in rows if "claimed" in row], COLUMNS)
    print_table("Rate of the fit", [row for row in rows if "rate" in row], RATE_COLUMNS)
    print_claims(claims)
    write_record(config.output, "speed", config, rows, claims)


if __name__ == "__main__":
    main(tyro.cli(SpeedConfig, description=__doc__))
