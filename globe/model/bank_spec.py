"""What a compressed model's config.json says about its banks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from globe.bank_shape import BankShape, ExpertSizes
from globe.errors import CheckpointError
from globe.terms import FAMILIES
from globe.typed import parsed, shown

_LARGEST = 1 << 20
"""Of layer numbers, ranks and bases: a bank of more has more parameters than torch can address."""


@dataclasses.dataclass(frozen=True)
class BankSpec:
    """One bank: whom it serves, and its shape.

    Raises `CheckpointError` if a field is out of its domain.
    """

    layers: tuple[int, ...]
    """Numbers of the decoder layers whose experts share the bank, increasing."""
    families: tuple[str, ...]
    """The families that share it, in the order gate, up, down."""
    rank: int
    """R."""
    num_bases: int
    """M."""
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

    @property
    def shared(self) -> bool:
        """Whether several layers use the bank; a bank of one layer lives inside that layer's experts."""
        return len(self.layers) > 1

    @property
    def name(self) -> str:
        """Name of the bank's module: `gate_up` for a layer's own, `layers_0_13_gate_up` for a shared one."""
        families = "_".join(self.families)
        return f"layers_{self.layers[0]}_{self.layers[-1]}_{families}" if self.shared else families

    def shape(self, experts: ExpertSizes) -> BankShape:
        """What is stored of each family of a layer with these experts, and of the bank."""
        sizes = (experts.num_experts, experts.intermediate_size, experts.hidden_size)
        return BankShape(*sizes, self.rank, self.num_bases)

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
        }


@dataclasses.dataclass(frozen=True)
class _Entry:
    layers: tuple[int, ...]
    families: tuple[str, ...]
    rank: int
    num_bases: int


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _increasing(numbers: tuple[int, ...]) -> bool:
    return all(low < high for low, high in itertools.pairwise(numbers))
