"""The settings of one fit: the API, the command line and the record of the run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from globe.errors import SettingsError
from globe.machine.device import AUTO, check_device_word
from globe.terms import Activation, CodeMap, Solver, WarmStartName
from globe.typed import documented, fit_settings

if TYPE_CHECKING:
    import torch

_LEAST = dict.fromkeys(("learning_rate", "tolerance", "window", "lambda_a", "lambda_b"), 0.0)


@documented
@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How one bank is fitted to the experts that share it."""

    rank: int
    """R: rows of a basis matrix, at most the rows P of an expert."""
    num_bases: int
    """M: basis matrices in the bank, at most the number of experts E."""
    activation: Activation = "tanh"
    """φ between bank and adapter."""
    codes: CodeMap = "ridge"
    """Codes: signed (ridge) or on the simplex."""
    support: int | None = None
    """Bases each expert mixes: exact for ridge, the median that the temperature steers to on the simplex; None: all."""
    solver: Solver = "varpro"
    """varpro: adapters eliminated, accelerated steps on codes and bases; am: closed-form alternating minimisation."""
    warm_start: WarmStartName = "procrustes"
    """Where the fit begins."""
    align_steps: int = 64
    """Alternations of the procrustes warm start."""
    max_steps: int = 500
    """Steps at most; the schedules are laid out over them."""
    learning_rate: float = 0.8
    """varpro: first step, in standard deviations of the codes and of the bases."""
    tolerance: float = 1e-5
    """Converged when the relative error falls by less than this share over `patience` steps."""
    patience: int = 25
    """Steps over which progress is judged."""
    window: float = 0.25
    """varpro: how far, as a share, the error may rise above the best before the solver returns to it."""
    lambda_a: float = 1e-6
    """Ridge of the adapters, relative to the mean diagonal of their Gram matrices."""
    lambda_b: float = 1e-4
    """am: ridge of the bank, relative likewise."""
    temperature: float = 1.0
    """First temperature of codes on the simplex."""
    min_temperature: float = 0.05
    """Lowest temperature."""
    max_temperature: float = 10.0
    """Highest temperature."""
    seed: int = 0
    """Seeds what is random in a warm start."""
    device: str = AUTO
    """Where the fit runs: cpu, cuda, mps, or auto: the GPU where there is one."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the fit."""

    def __post_init__(self) -> None:
        fit_settings(self, SettingsError, rank=1, num_bases=1, max_steps=1, align_steps=1, patience=1, **_LEAST)
        check_device_word(self.device)
        if self.support is not None and not 1 <= self.support <= self.num_bases:
            raise SettingsError(
                f"support is {self.support}; with {self.num_bases} bases it must be 1 to {self.num_bases}"
            )
        if not 0 < self.min_temperature <= self.temperature <= self.max_temperature:
            raise SettingsError(
                f"temperature {self.temperature} must lie in [min_temperature, max_temperature] = "
                f"[{self.min_temperature}, {self.max_temperature}], all above 0"
            )

    def check_shape(self, num_experts: int, rows: int, columns: int) -> None:
        """Raise `SettingsError` if the bank does not fit `num_experts` matrices of `rows` x `columns`."""
        if self.rank > min(rows, columns):
            raise SettingsError(
                f"rank {self.rank} exceeds the {rows} rows or {columns} columns of an expert; "
                f"choose a rank of at most {min(rows, columns)}"
            )
        if self.num_bases > num_experts:
            raise SettingsError(
                f"{self.num_bases} bases for {num_experts} experts save nothing; choose at most {num_experts} bases, "
                f"or let more experts share the bank"
            )

    def check_streamed(self) -> None:
        """Raise `SettingsError` unless experts can be streamed to this fit: one of signed codes, all bases, varpro."""
        if (self.solver, self.codes, self.warm_start, self.support) != ("varpro", "ridge", "procrustes", None):
            raise SettingsError(
                "experts are streamed with the solver varpro, ridge codes, no support and the warm start procrustes; "
                f"found {self.solver}, {self.codes}, support {self.support}, {self.warm_start}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return torch.float64 if self.dtype == "float64" else torch.float32
