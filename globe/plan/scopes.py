"""From settings and shapes to banks: which experts share one, and of what rank and size, before any work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from globe.errors import SettingsError
from globe.plan.settings import CompressConfig
from globe.terms import Family

ADAPTER_SHARE = 0.68
"""Share of the kept parameters that goes to the adapters while R < P; measured, see docs/log.md."""


class ExpertShape(Protocol):
    """What planning needs to know of a layer's experts."""

    @property
    def index(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class BankPlan:
    """One bank: whom it serves and its shape."""

    layers: tuple[int, ...]
    families: tuple[Family, ...]
    num_matrices: int
    """E: expert matrices that share the bank."""
    rows: int
    """P."""
    columns: int
    """D."""
    rank: int
    """R."""
    num_bases: int
    """M."""
    predicted_error: float | None = None
    """Relative error to expect, where the budget was allocated by what was measured."""

    @property
    def original_parameters(self) -> int:
        return self.num_matrices * self.rows * self.columns

    @property
    def stored_parameters(self) -> int:
        return stored_parameters(self.num_matrices, self.rows, self.columns, self.rank, self.num_bases)

    @property
    def step_multiply_adds(self) -> int:
        """Of one evaluation of objective and gradient: mixing, adapters with their Gram matrices, gradient."""
        E, P, D, R, M = self.num_matrices, self.rows, self.columns, self.rank, self.num_bases
        return E * R * D * (M + 6 * P + R)


@dataclasses.dataclass(frozen=True)
class Scope:
    """The unit of work: layers whose experts are read, fitted, written and forgotten together."""

    layers: tuple[int, ...]
    banks: tuple[BankPlan, ...]
    """None where experts are coded."""


def scope_from_json(record: Mapping[str, Any]) -> Scope:
    """The inverse of `dataclasses.asdict`, through JSON."""
    banks = [{**bank, "layers": tuple(bank["layers"]), "families": tuple(bank["families"])} for bank in record["banks"]]
    return Scope(tuple(record["layers"]), tuple(BankPlan(**bank) for bank in banks))


def stored_parameters(num_matrices: int, rows: int, columns: int, rank: int, num_bases: int) -> int:
    """E·P·R + M·R·D + E·M."""
    return num_matrices * rows * rank + num_bases * rank * columns + num_matrices * num_bases


def lowest_keep(num_matrices: int, rows: int, columns: int) -> float:
    """The share of the parameters that the least bank has: one basis of one row."""
    return stored_parameters(num_matrices, rows, columns, 1, 1) / (num_matrices * rows * columns)


def _rounded_up(value: float) -> float:
    """To two significant digits or so: what is said to be in reach is."""
    scale = 10.0 ** (1 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale


def choose_shape(num_matrices: int, rows: int, columns: int, keep: float) -> tuple[int, int]:
    """Rank and number of bases that store at most `keep` of E·P·D parameters.

    R = P while the adapters then take at most two thirds of what is kept, else the rank that gives them that share
    (more where the bank could not use the rest); the bank takes the rest, and of the ranks within 5 % of that the one
    that leaves least of the budget unused. Raises `SettingsError` with the reachable range when no bank fits.
    """
    total = num_matrices * rows * columns
    _check_reach(keep, num_matrices, rows, columns)

    def affordable(rank: int) -> int:
        return int((keep * total - num_matrices * rows * rank) / (rank * columns + num_matrices))

    highest = min(rows, max(1, round(ADAPTER_SHARE * keep * columns)))
    while highest < min(rows, columns) and affordable(highest) >= num_matrices:
        highest += 1
    shapes: list[tuple[int, int, int]] = []
    for rank in range(highest, 0, -1):
        num_bases = min(num_matrices, affordable(rank))
        if num_bases >= 1:
            shapes.append((stored_parameters(num_matrices, rows, columns, rank, num_bases), rank, num_bases))
        if shapes and rank < 0.95 * shapes[0][1]:
            break
    return max(shapes)[1:] if shapes else (1, 1)  # a rounding short of the lowest


def _check_reach(keep: float, num_matrices: int, rows: int, columns: int) -> None:
    lowest = lowest_keep(num_matrices, rows, columns)
    if not lowest <= keep < 1:
        reach = f"choose from {_rounded_up(lowest):g} to below 1" if _rounded_up(lowest) < 1 else "nothing can be saved"
        raise SettingsError(f"keep {keep:g} is out of reach for {num_matrices} experts of {rows} x {columns}; {reach}")


def make_plan(layers: Sequence[ExpertShape], config: CompressConfig) -> list[Scope]:
    """The scopes of a compression with resolved settings, in layer order.

    Raises `SettingsError` for a layer that holds no experts, experts of different shapes in one scope, or settings out
    of reach.
    """
    runs = _runs(_chosen_layers(layers, config), config)
    if config.keep is not None:
        shapes = [shape for run in runs for _, *shape in _banks(run, config)]
        _check_reach(config.keep, *max(shapes, key=lambda shape: lowest_keep(*shape)))
    return [_scope(run, config) for run in runs]


def _chosen_layers(layers: Sequence[ExpertShape], config: CompressConfig) -> list[ExpertShape]:
    if config.layers is None:
        return list(layers)
    by_index = {layer.index: layer for layer in layers}
    missing = sorted(set(config.layers) - by_index.keys())
    if missing or not config.layers:
        raise SettingsError(
            f"layers {', '.join(map(str, missing)) or '(none)'} hold no routed experts; "
            f"the layers that do are {compact(sorted(by_index))}"
        )
    return [by_index[index] for index in sorted(set(config.layers))]


def _runs(layers: list[ExpertShape], config: CompressConfig) -> list[list[ExpertShape]]:
    """Split the layers into scopes: by the setting, then so that no bank serves more than `max_experts` matrices."""
    width = {"layer": 1, "model": len(layers)}.get(config.scope) or int(config.scope)
    per_expert = len(config.families) if config.share_families else 1
    if config.max_experts is not None:
        widest = max(layer.num_experts for layer in layers) * per_expert
        if config.max_experts < widest:
            raise SettingsError(
                f"max_experts is {config.max_experts}, but one layer alone has {widest} expert matrices that share a "
                f"bank; raise it to at least {widest}, or use separate banks for the families"
            )
        width = min(width, config.max_experts // widest)
    return [layers[start : start + width] for start in range(0, len(layers), width)]


def _banks(layers: list[ExpertShape], config: CompressConfig) -> list[tuple[tuple[Family, ...], int, int, int]]:
    """The banks of a scope: their families, and how many matrices of how many rows and columns share each."""
    shapes = {(layer.intermediate_size, layer.hidden_size) for layer in layers}
    if len(shapes) > 1:
        raise SettingsError(
            f"layers {compact([layer.index for layer in layers])} have experts of different shapes "
            f"{sorted(shapes)} and cannot share a bank; choose scope layer, or fewer layers"
        )
    (rows, columns), num_experts = shapes.pop(), sum(layer.num_experts for layer in layers)
    groups: list[tuple[Family, ...]] = (
        [config.families] if config.share_families else [(family,) for family in config.families]
    )
    return [(families, num_experts * len(families), rows, columns) for families in groups]


def _scope(layers: list[ExpertShape], config: CompressConfig) -> Scope:
    indices, banks = tuple(layer.index for layer in layers), list[BankPlan]()
    if config.is_coded:
        return Scope(indices, ())
    for families, num_matrices, rows, columns in _banks(layers, config):
        if config.keep is not None:
            rank, num_bases = choose_shape(num_matrices, rows, columns, config.keep)
        else:
            assert config.rank_ratio is not None
            assert config.basis_ratio is not None
            rank, num_bases = round(config.rank_ratio * rows), round(config.basis_ratio * num_matrices)
            rank, num_bases = max(1, rank), max(1, num_bases)
        config.fit_config(rank, num_bases).check_shape(num_matrices, rows, columns)
        banks.append(BankPlan(indices, families, num_matrices, rows, columns, rank, num_bases))
    return Scope(indices, tuple(banks))


def compact(indices: Sequence[int]) -> str:
    """Sorted indices as runs: 0-3, 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
