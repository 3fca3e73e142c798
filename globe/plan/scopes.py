"""From settings and shapes to banks: which experts share one, and of what rank and size, before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from globe.bank_shape import BankShape, ExpertSizes
from globe.errors import CheckpointError, SettingsError
from globe.plan.budget import Bits, Keep, Ratios, least_share
from globe.plan.settings import CompressConfig
from globe.terms import Family
from globe.typed import parsed


class LayerSizes(ExpertSizes, Protocol):
    """What planning needs to know of a layer."""

    @property
    def index(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class BankPlan:
    """One bank: whom it serves and its shape."""

    layers: tuple[int, ...]
    families: tuple[Family, ...]
    shape: BankShape
    predicted_error: float | None = None
    """Relative error to expect, where the budget was allocated by what was measured."""


@dataclasses.dataclass(frozen=True)
class Scope:
    """The unit of work: layers whose experts are read, fitted, written and forgotten together."""

    layers: tuple[int, ...]
    banks: tuple[BankPlan, ...]
    """None where experts are coded."""


def scope_from_json(record: Mapping[str, Any]) -> Scope:
    """The inverse of `dataclasses.asdict`, through JSON."""
    return parsed(Scope, record, "a scope of the plan", CheckpointError)


def make_plan(layers: Sequence[LayerSizes], config: CompressConfig) -> list[Scope]:
    """The scopes of a compression with resolved settings, in layer order.

    Raises `SettingsError` for a layer that holds no experts, experts of different shapes in one scope, or settings out
    of reach.
    """
    runs = _runs(_chosen_layers(layers, config), config)
    budget = config.budget
    if isinstance(budget, Bits):
        return [Scope(_indices(run), ()) for run in runs]
    stacks = [matrices for run in runs for _, matrices in _banks(run, config)]
    budget.shape_for(max(stacks, key=least_share))  # what is out of reach is said of the bank that needs most
    return [_scope(run, config, budget) for run in runs]


def _chosen_layers(layers: Sequence[LayerSizes], config: CompressConfig) -> list[LayerSizes]:
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


def _runs(layers: list[LayerSizes], config: CompressConfig) -> list[list[LayerSizes]]:
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


def _banks(layers: list[LayerSizes], config: CompressConfig) -> list[tuple[tuple[Family, ...], tuple[int, int, int]]]:
    """The banks of a scope: the families of each, and the matrices (E, P, D) that share it."""
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
    return [(families, (num_experts * len(families), rows, columns)) for families in groups]


def _scope(layers: list[LayerSizes], config: CompressConfig, budget: Keep | Ratios) -> Scope:
    indices, banks = _indices(layers), list[BankPlan]()
    for families, matrices in _banks(layers, config):
        shape = budget.shape_for(matrices)
        config.fit_config(shape).check_shape(*matrices)
        banks.append(BankPlan(indices, families, shape))
    return Scope(indices, tuple(banks))


def _indices(layers: list[LayerSizes]) -> tuple[int, ...]:
    return tuple(layer.index for layer in layers)


def compact(indices: Sequence[int]) -> str:
    """Sorted indices as runs: 0-3, 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
