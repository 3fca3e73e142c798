"""The settings of a compression: the API, the command line and the record of the run."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from globe.bank_shape import BankShape
from globe.errors import SettingsError
from globe.machine.device import AUTO, usable_device
from globe.plan.budget import DEFAULT_BITS, MOST_BITS, MOST_PACKED_BITS, Bits, Budget, Keep, Ratios
from globe.terms import FAMILIES, Activation, CodeMap, Family, Solver, WarmStartName
from globe.train.config import FitConfig
from globe.typed import documented, fit_settings, shown

FloatDtype = Literal["source", "float32", "bfloat16", "float16"]
Format = Literal["globe", "compressed-tensors"]

_OF_BANKS = (
    "scope",
    "share_families",
    "max_experts",
    "stream",
    "activation",
    "codes",
    "support",
    "solver",
    "warm_start",
    "steps",
    "factor_dtype",
)
"""What is said of banks in floating point: with `bits` there are none."""


@documented
@dataclasses.dataclass(frozen=True)
class CompressConfig:
    """How a model is compressed."""

    keep: float | None = None
    """Share of the compressed families' parameters that stays, above 0 and below 1, in banks of floating-point factors;
    chooses rank and bases."""
    bits: float | None = None
    """Stored bits per original weight of the compressed families, everything counted, from 1.5 to 8: each expert is
    coded, with more bits where an error costs the model more. 4 unless keep or ratios are given."""
    format: Format = "globe"
    """GloBE's own, or `compressed-tensors`, which vLLM serves by itself, at a higher loss: 4 or 8 bits for all experts
    of a layer, chosen by what errors cost, and a scale for each 128 weights; `bits` then counts from 4.13, and all
    layers have 4 without it."""
    rank_ratio: float | None = None
    """R / P, with `basis_ratio`, instead of `keep`."""
    basis_ratio: float | None = None
    """M / E, E counting all the matrices that share a bank, with `rank_ratio`, instead of `keep`."""
    allocation: Literal["sensitivity", "uniform"] = "sensitivity"
    """How the budget is shared out among banks or experts: by what their errors cost the model's output, measured on
    the text of `calibrate` or else on random tokens, or all counting the same."""
    families: tuple[Family, ...] = FAMILIES
    """Matrices of an expert to compress: any of gate, up, down."""
    scope: str = "layer"
    """Experts that share a bank: `layer`, `model`, or a number of consecutive layers."""
    share_families: bool = True
    """One bank for all families of a scope; otherwise one for each family."""
    layers: tuple[int, ...] | None = None
    """Indices of the layers to compress, on the command line also runs such as `0-3 7`; None: all that hold experts."""
    max_experts: int | None = None
    """Most expert matrices that one bank serves: a wider scope is split into runs of whole layers."""
    stream: bool = False
    """Read one layer of a scope at a time, again on every pass, and move the bank after each: memory then follows the
    bank and one layer, not the scope."""
    activation: Activation = "tanh"
    """φ between bank and adapter."""
    codes: CodeMap = "ridge"
    """Codes: signed (ridge) or on the simplex."""
    support: int | None = None
    """Bases each expert mixes; None: all."""
    solver: Solver = "varpro"
    """varpro: adapters eliminated, accelerated steps; am: closed-form alternating minimisation."""
    warm_start: WarmStartName = "procrustes"
    """Where each fit begins."""
    calibrate: str = "samples"
    """Text on which the model is run first, to weigh errors by what they do there: `samples` of its own, or
    `calibration` where it does not fit into memory; a file, plain text or with a field `text`, or a chat in `messages`,
    in each line of JSON; a data set of the Hub with such fields, OWNER/NAME, OWNER/NAME:CONFIG or
    OWNER/NAME:CONFIG:SPLIT (train unless said), of which the first rows are fetched; `calibration`, the prose and code
    that ship with GloBE, which a bare --calibrate means; or `none`: the weights alone are looked at."""
    calibration_tokens: int = 65536
    """Tokens of a given text at most."""
    save_statistics: str | None = None
    """File in which to keep what running the model says of its experts, for other runs on the same model."""
    statistics: str | None = None
    """Such a file, from which that is taken, with `bits` without running the model; its text stands for `calibrate`."""
    trust_remote_code: bool = False
    """Run the code of a tokenizer that brings its own, to read the text."""
    steps: int = 500
    """Steps of each fit at most."""
    seed: int = 0
    """Seeds what is random in a warm start."""
    device: str = AUTO
    """Where the model and the fits run: cpu, cuda, mps, or auto: the GPU where there is one. `globe compress`
    takes all GPUs, in a process each; with cuda:1 that one."""
    factor_dtype: FloatDtype = "source"
    """What the factors of a bank are stored in: the dtype of the weights (source) or another."""

    def __post_init__(self) -> None:
        fit_settings(self, SettingsError, support=1, max_experts=1, steps=1, calibration_tokens=1)
        ratios = (self.rank_ratio, self.basis_ratio)
        if (self.rank_ratio is None) != (self.basis_ratio is None):
            raise SettingsError("rank_ratio and basis_ratio go together; give both, or keep alone")
        if (self.keep is not None) + (self.bits is not None) + (ratios != (None, None)) > 1:
            raise SettingsError("give one of keep, bits, or rank_ratio with basis_ratio")
        is_coded = self.is_coded  # which makes the budget, and so checks it
        if not self.families:
            raise SettingsError(f"families must be any of {', '.join(FAMILIES)}; found none")
        object.__setattr__(self, "families", tuple(f for f in FAMILIES if f in self.families))
        if self.scope not in ("layer", "model") and not re.fullmatch("0*[1-9][0-9]{0,8}", self.scope):
            raise SettingsError(f"scope {shown(self.scope)} is unknown; choose layer, model or a number of layers")
        if self.layers is not None and any(index < 0 for index in self.layers):
            raise SettingsError(f"layers {shown(list(self.layers))} has a negative one; layers count from 0")
        if is_coded and (said := [name for name in _OF_BANKS if getattr(self, name) != _default(name)]):
            raise SettingsError(
                f"{said[0]} is a setting of banks, which bits has none of: give keep with it, or leave it out"
            )
        if self.is_packed and (not is_coded or self.families != FAMILIES):
            raise SettingsError(
                "format compressed-tensors holds whole experts in few bits: leave out keep, the ratios and families"
            )
        if self.statistics is not None and self.calibrate != _default("calibrate"):
            raise SettingsError("statistics come with the text that they were measured on: leave calibrate out")
        if self.save_statistics is not None and self.calibrate == "none":
            raise SettingsError("there are no statistics to save where calibrate is none: the model is not run")
        fit = self.fit_config(BankShape(1, 1, 1, rank=1, num_bases=self.support or 1))
        if self.stream:
            fit.check_streamed()

    def resolved(self) -> CompressConfig:
        """The same settings with `bits` filled in where nothing says how much to keep, and the device that `auto` is.

        Raises `SettingsError` unless torch can compute on the device here.
        """
        bits = self.budget.per_weight if isinstance(self.budget, Bits) else None
        return dataclasses.replace(self, bits=bits, device=usable_device(self.device))

    @property
    def budget(self) -> Budget:
        """How much of the experts is stored."""
        if self.keep is not None:
            return Keep(self.keep)
        if self.rank_ratio is not None and self.basis_ratio is not None:
            return Ratios(self.rank_ratio, self.basis_ratio)
        most = MOST_PACKED_BITS if self.is_packed else MOST_BITS
        return Bits(DEFAULT_BITS if self.bits is None else self.bits, most)

    @property
    def is_coded(self) -> bool:
        """Whether experts are coded in few bits, and not put into banks of floating-point factors."""
        return isinstance(self.budget, Bits)

    @property
    def is_packed(self) -> bool:
        """Whether that is in a format that others serve."""
        return self.format == "compressed-tensors"

    def fit_config(self, bank: BankShape) -> FitConfig:
        """The settings of one bank's fit."""
        return FitConfig(
            rank=bank.rank,
            num_bases=bank.num_bases,
            activation=self.activation,
            codes=self.codes,
            support=None if self.support is None else min(self.support, bank.num_bases),
            solver=self.solver,
            warm_start=self.warm_start,
            max_steps=self.steps,
            seed=self.seed,
            device=self.device,
        )


def _default(name: str) -> object:
    return next(field.default for field in dataclasses.fields(CompressConfig) if field.name == name)
