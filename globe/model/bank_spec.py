"""What a compressed model's config.json says about its banks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from globe.bank.precision import Precision
from globe.errors import CheckpointError
from globe.terms import BITS, FAMILIES
from globe.typed import parsed, shown

_LARGEST = 1 << 20
"""Of layer numbers, ranks and bases: a bank of more has more parameters than torch can address."""
PLAIN = {"bases": "plain", "codes": "plain", "adapters": "plain"}
"""The encoding of factors as they are, in a floating-point dtype."""
_BITS: Mapping[str, int | None] = {"plain": None, **{f"int{bits}": bits for bits in BITS}}
"""What this version reads: plain, or rows of few bits (`globe.bank.rounding`)."""


@dataclasses.dataclass(frozen=True)
class BankSpec:
    """One bank: whom it serves, its shape, and how its factors are stored.

    Raises `CheckpointError` if a field is out of its domain or the encoding is not known.
    """

    layers: tuple[int, ...]
    """Numbers of the decoder layers whose experts share the bank, increasing."""
    families: tuple[str, ...]
    """The families that share it, in the order gate, up, down."""
    rank: int
    """R."""
    num_bases: int
    """M."""
    encoding: Mapping[str, str] = dataclasses.field(default_factory=PLAIN.copy, hash=False)
    """How bases, codes and adapters are stored."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """What else the entry held; written back unchanged."""

    def __post_init__(self) -> None:
        if not self.layers or any(not _is_count(layer, 0) for layer in self.layers) or not _increasing(self.layers):
            raise CheckpointError(f"a bank's layers must be increasing layer numbers; found {shown(list(self.layers))}")
        if not self.families or self.families != tuple(family for family in FAMILIES if family in self.families):
            expected = ", ".join(FAMILIES)
            raise CheckpointError(
                f"a bank's families must be some of {expected}, in this order; found {shown(list(self.families))}"
            )
        for name in ("rank", "num_bases"):
            if not _is_count(getattr(self, name), 1):
                raise CheckpointError(
                    f"bank {self.name}: {name} must be a positive int, of {_LARGEST} at most; found "
                    f"{shown(getattr(self, name))}"
                )
        if self.encoding.keys() != PLAIN.keys() or not set(self.encoding.values()) <= _BITS.keys():
            raise CheckpointError(
                f"bank {self.name}: this version reads encodings of {', '.join(PLAIN)}, each one of "
                f"{', '.join(_BITS)}; found {shown(dict(self.encoding))}. Install the version of globe-moe that wrote "
                "the checkpoint"
            )

    @property
    def precision(self) -> Precision:
        """The bits of each factor."""
        return Precision(**{factor: _BITS[name] for factor, name in self.encoding.items()})

    @property
    def shared(self) -> bool:
        """Whether several layers use the bank; a bank of one layer lives inside that layer's experts."""
        return len(self.layers) > 1

    @property
    def name(self) -> str:
        """Name of the bank's module: `gate_up` for a layer's own, `layers_0_13_gate_up` for a shared one."""
        families = "_".join(self.families)
        return f"layers_{self.layers[0]}_{self.layers[-1]}_{families}" if self.shared else families

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> BankSpec:
        """Parse an entry of config.json's `banks`; `CheckpointError` if a field is missing or ill-formed."""
        known = parsed(_Entry, entry, "an entry of config.json's banks", CheckpointError)
        fields = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
        return cls(**fields, extra={key: value for key, value in entry.items() if key not in fields})

    def to_dict(self) -> dict[str, Any]:
        """The entry for config.json."""
        return {
            **self.extra,
            "layers": list(self.layers),
            "families": list(self.families),
            "rank": self.rank,
            "num_bases": self.num_bases,
            "encoding": dict(self.encoding),
        }


@dataclasses.dataclass(frozen=True)
class _Entry:
    layers: tuple[int, ...]
    families: tuple[str, ...]
    rank: int
    num_bases: int
    encoding: dict[str, str]


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _increasing(numbers: tuple[int, ...]) -> bool:
    return all(low < high for low, high in itertools.pairwise(numbers))


def encoding_of(precision: Precision) -> dict[str, str]:
    """The entry of config.json for factors of so many bits."""
    bits = dataclasses.asdict(precision)
    return {factor: "plain" if bits[factor] is None else f"int{bits[factor]}" for factor in PLAIN}
