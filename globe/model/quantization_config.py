"""The `quantization_config` section of a compressed model's config.json."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from globe.bank.activations import check_activation
from globe.checkpoint.quantized import QUANT_METHOD
from globe.checkpoint.reader import Checkpoint
from globe.errors import CheckpointError
from globe.model.bank_spec import BankSpec
from globe.model.coded_spec import CodedSpec
from globe.typed import shown

FORMAT_VERSION = 2


class CompressingConfig(QuantizationConfigMixin, abc.ABC):
    """What a dense model is loaded with that is to be compressed first."""

    @abc.abstractmethod
    def compressed(self, source: Path) -> AbstractContextManager[Path]:
        """The folder of the compressed model, given that of the dense one; there until the model is loaded."""


class GlobeQuantizationConfig(QuantizationConfigMixin):
    """Which experts are compressed, and how.

    Args:
        banks: entries of config.json, or `BankSpec`s.
        coded: entries of config.json, or `CodedSpec`s; each (layer, family) is in one bank or coded, or neither.
        activation: φ of every bank: identity, silu or tanh.
        format_version: of the checkpoint; anything but 2 is refused.
        globe_version: what wrote the checkpoint.
        run: identity of the compression, which every file with factors repeats; None: not known, and not checked.
        extra: what else the section holds; it is kept and written back.

    Raises `CheckpointError` or `SettingsError`, both `GlobeError`s, if the section cannot be understood.
    """

    def __init__(
        self,
        /,
        banks: Sequence[BankSpec | Mapping[str, Any]] = (),
        coded: Sequence[CodedSpec | Mapping[str, Any]] = (),
        activation: str = "tanh",
        format_version: int = FORMAT_VERSION,
        globe_version: str | None = None,
        run: str | None = None,
        **extra: Any,
    ) -> None:
        extra.pop("quant_method", None)
        if type(format_version) is not int or format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"this version reads GloBE checkpoints of format_version {FORMAT_VERSION}; found "
                f"{shown(format_version)}. Install the version of globe-moe that wrote the checkpoint"
            )
        check_activation(activation)
        for name, entries in (("banks", banks), ("coded", coded)):
            if not isinstance(entries, (list, tuple)):
                raise CheckpointError(f"quantization_config's {name} must be a list; found {shown(entries)}")
        for name, value in (("globe_version", globe_version), ("run", run)):
            if value is not None and not isinstance(value, str):
                raise CheckpointError(f"quantization_config's {name} must be text; found {shown(value)}")
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue] - an enum of the built-in ones
        self.format_version = format_version
        self.globe_version = globe_version
        self.run = run
        self.activation = activation
        self.banks = tuple(bank if isinstance(bank, BankSpec) else BankSpec.from_dict(bank) for bank in banks)
        self.coded = tuple(spec if isinstance(spec, CodedSpec) else CodedSpec.from_dict(spec) for spec in coded)
        self.extra = extra
        _check_coverage(self.banks, self.coded)

    def to_dict(self) -> dict[str, Any]:
        """The section as config.json holds it."""
        return {
            **self.extra,
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "globe_version": self.globe_version,
            **({} if self.run is None else {"run": self.run}),
            "activation": self.activation,
            "banks": [bank.to_dict() for bank in self.banks],
            "coded": [spec.to_dict() for spec in self.coded],
        }

    def banks_of(self, layer: int) -> list[BankSpec]:
        """The banks that serve a layer."""
        return [bank for bank in self.banks if layer in bank.layers]

    def coded_of(self, layer: int) -> list[CodedSpec]:
        """The coded families of a layer."""
        return [spec for spec in self.coded if spec.layer == layer]

    @property
    def compressed(self) -> list[tuple[int, str]]:
        """Layer and family of all that is compressed."""
        in_banks = [place for bank in self.banks for place in itertools.product(bank.layers, bank.families)]
        return in_banks + [(spec.layer, spec.family) for spec in self.coded]


def read_section(checkpoint: Checkpoint) -> GlobeQuantizationConfig:
    """The section of a compressed model; `CheckpointError` if there is none, or one that cannot be understood."""
    section = checkpoint.config.get("quantization_config")
    if not isinstance(section, Mapping) or section.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{checkpoint.folder} is not compressed by GloBE: its config.json has no section of it")
    return GlobeQuantizationConfig(**section)


def _check_coverage(banks: tuple[BankSpec, ...], coded: tuple[CodedSpec, ...]) -> None:
    if not banks and not coded:
        raise CheckpointError(
            "quantization_config has no banks and nothing coded: it says nothing about how to read this checkpoint"
        )
    owner: dict[tuple[int, str], str] = {}
    held = [(place, f"bank {bank.name}") for bank in banks for place in itertools.product(bank.layers, bank.families)]
    for place, name in [*held, *(((spec.layer, spec.family), "what is coded") for spec in coded)]:
        if place in owner:
            raise CheckpointError(
                f"{place[1]} of layer {place[0]} is twice in config.json: in {owner[place]} and in {name}"
            )
        owner[place] = name
