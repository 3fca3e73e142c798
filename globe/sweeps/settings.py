"""The settings of a sweep: the API, the command line and the record of the run."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

from globe.errors import SettingsError
from globe.measure.settings import EvaluateConfig
from globe.plan.settings import CompressConfig
from globe.terms import Activation, CodeMap, WarmStartName
from globe.typed import documented, fit_settings, shown

AXES = ("keep", "scope", "layers", "activation", "codes", "warm_start")

Setting = float | str


@documented
@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The grid, and what all of its points share."""

    keep: tuple[float, ...] = (0.75, 0.625, 0.5)
    """Shares of the parameters to keep."""
    scope: tuple[str, ...] = (CompressConfig.scope,)
    """Experts that share a bank: `layer`, `model`, or a number of consecutive layers."""
    layers: tuple[str, ...] = ("all",)
    """Choices of layers, each `all` or indices without spaces: `12`, `0-3`, `0-3,7`."""
    activation: tuple[Activation, ...] = (CompressConfig.activation,)
    """φ between bank and adapter."""
    codes: tuple[CodeMap, ...] = (CompressConfig.codes,)
    """Codes: signed (ridge) or on the simplex."""
    warm_start: tuple[WarmStartName, ...] = (CompressConfig.warm_start,)
    """Where each fit begins."""
    common: CompressConfig = CompressConfig(keep=0.75)
    """All other settings, the same at every point; its keep says that there are banks, and is each point's own."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What every point is judged on."""
    save_models: bool = False
    """Keep the compressed models and not only their records."""
    trust_remote_code: bool = False
    """Run the code of a tokenizer that brings its own, to calibrate and to judge."""

    def __post_init__(self) -> None:
        fit_settings(self, SettingsError)
        if self.trust_remote_code:
            for name in ("common", "evaluate"):
                trusting = dataclasses.replace(getattr(self, name), trust_remote_code=True)
                object.__setattr__(self, name, trusting)
        for axis in AXES:
            values = getattr(self, axis)
            if not values or len(set(values)) < len(values):
                raise SettingsError(f"{axis} holds {list(values)}; give one or more values, each once")
            if axis != "keep" and getattr(self.common, axis) != getattr(CompressConfig, axis):
                raise SettingsError(f"{axis} is an axis of the sweep: give its values there, not among what is common")
        if self.common.rank_ratio is not None or self.common.bits is not None:
            raise SettingsError("a sweep chooses rank and bases by keep: leave out bits, rank_ratio and basis_ratio")
        for choice in self.layers:
            parse_layers(choice)
        for keep, scope in itertools.product(self.keep, self.scope):
            CompressConfig(keep=keep, scope=scope)

    def points(self) -> list[dict[str, Setting]]:
        """The settings of every point along the axes; the last axis varies fastest."""
        return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*self._values())]

    def varying(self) -> list[str]:
        """The axes that have more than one value."""
        return [axis for axis, values in zip(AXES, self._values(), strict=True) if len(values) > 1]

    def at(self, point: dict[str, Setting]) -> CompressConfig:
        """The compression that a point stands for; `SettingsError` if it cannot be."""
        settings: dict[str, Any] = {**point, "layers": parse_layers(str(point["layers"]))}
        return dataclasses.replace(self.common, **settings)

    def _values(self) -> list[tuple[Setting, ...]]:
        return [getattr(self, axis) for axis in AXES]


def parse_layers(choice: str) -> tuple[int, ...] | None:
    """`all` is None; `0-3,7` is (0, 1, 2, 3, 7). Raises `SettingsError` for anything else."""
    if choice == "all":
        return None
    if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", choice, re.ASCII):
        raise SettingsError(f"layers {shown(choice)} is not understood; write all, 12, 0-3 or 0-3,7")
    runs = [[int(end) for end in run.split("-")] for run in choice.split(",")]
    if backwards := next((run for run in runs if run[0] > run[-1]), None):
        raise SettingsError(f"layers {backwards[0]}-{backwards[1]} runs backwards; write {backwards[1]}-{backwards[0]}")
    return tuple(sorted({index for run in runs for index in range(run[0], run[-1] + 1)}))
