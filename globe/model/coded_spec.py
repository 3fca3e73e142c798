"""What a compressed model's config.json says about a family of experts that is coded in few bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from globe.errors import CheckpointError
from globe.quant.banked import BankedExperts, CodedBank
from globe.quant.coded import CodedExperts
from globe.quant.outputs import Outputs
from globe.quant.side import OwnRows, SharedRows
from globe.terms import FAMILIES, Family
from globe.typed import parsed, shown

_LARGEST = 1 << 48
"""Of the bytes of a payload."""


@dataclasses.dataclass(frozen=True)
class CodedSpec:
    """One family of one layer, coded.

    Raises `CheckpointError` if a field is out of its domain.
    """

    layer: int
    """Number of the decoder layer."""
    family: Family
    payload: int
    """Bytes of the paths of all rows."""
    shared: bool
    """Whether widths and scales are sums of a number of the expert's and one of the input's, or each row's own."""
    scaled: bool
    """Whether outputs have scales (`globe.quant.outputs`)."""
    num_bases: int = 0
    """Bases of the bank of what the experts share; 0: there is none."""
    bases_payload: int = 0
    """Bytes of the paths of the bases' rows."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """What else the entry held; written back unchanged."""

    def __post_init__(self) -> None:
        where = f"layer {shown(self.layer)} {shown(self.family)}"
        if self.family not in FAMILIES:
            raise CheckpointError(f"a coded family must be one of {', '.join(FAMILIES)}; found {shown(self.family)}")
        limits = {"layer": 1 << 20, "payload": _LARGEST, "num_bases": 1 << 10, "bases_payload": _LARGEST}
        for name, most in limits.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise CheckpointError(f"coded {where}: {name} must be from 0 to {most}; found {shown(value)}")

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"layer {self.layer} {self.family}"

    def shapes(self, sizes: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that is stored, by part, for experts of sizes (E, N, K)."""
        E, N, K = sizes
        if self.shared:
            side = {
                "expert_costs": ((E,), torch.int16),
                "input_costs": ((N,), torch.int16),
                "expert_scales": ((E,), torch.int16),
                "input_scales": ((N,), torch.int8),
            }
        else:
            side = {
                "row_widths": ((E, (N + 1) // 2), torch.uint8),
                "row_scales": ((E, N), torch.uint8),
                "expert_scales": ((E,), torch.int16),
            }
        if self.scaled:
            side |= {"output_scales": ((E, K), torch.int8)}
        if M := self.num_bases:
            side |= {
                "codes": ((E, M), torch.int16),
                "bases_payload": ((self.bases_payload,), torch.uint8),
                "bases_row_widths": ((M, (N + 1) // 2), torch.uint8),
                "bases_row_scales": ((M, N), torch.uint8),
                "bases_scales": ((M,), torch.int16),
            }
        return {"payload": ((self.payload,), torch.uint8), **side}

    def experts(self, parts: Mapping[str, Tensor], num_outputs: int) -> BankedExperts:
        """What the stored parts are together."""
        if self.shared:
            side: OwnRows | SharedRows = SharedRows(
                parts["expert_costs"], parts["input_costs"], parts["expert_scales"], parts["input_scales"]
            )
        else:
            side = OwnRows(parts["row_widths"], parts["row_scales"], parts["expert_scales"])
        outputs = Outputs(parts["output_scales"] if self.scaled else None)
        rest, bank = CodedExperts(parts["payload"], side, num_outputs, outputs), None
        if self.num_bases:
            of_bases = OwnRows(parts["bases_row_widths"], parts["bases_row_scales"], parts["bases_scales"])
            bank = CodedBank(CodedExperts(parts["bases_payload"], of_bases, num_outputs, Outputs()), parts["codes"])
        return BankedExperts(rest, bank)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> CodedSpec:
        """Parse an entry of config.json's `coded`; `CheckpointError` if a field is missing or ill-formed."""
        known = parsed(_Entry, entry, "an entry of config.json's coded", CheckpointError)
        fields = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
        return cls(**fields, extra={key: value for key, value in entry.items() if key not in fields})

    def to_dict(self) -> dict[str, Any]:
        """The entry for config.json."""
        known = {
            name: getattr(self, name)
            for name in ("layer", "family", "payload", "shared", "scaled", "num_bases", "bases_payload")
        }
        return {**self.extra, **known}


@dataclasses.dataclass(frozen=True)
class _Entry:
    layer: int
    family: str
    payload: int
    shared: bool
    scaled: bool
    num_bases: int
    bases_payload: int


def spec_of(layer: int, family: Family, coded: BankedExperts) -> CodedSpec:
    """What config.json will say of coded experts."""
    rest, bank = coded.rest, coded.bank
    of_bank = (0, 0) if bank is None else (bank.codes.shape[1], bank.bases.payload.numel())
    is_shared, is_scaled = isinstance(rest.side, SharedRows), rest.outputs.exponents is not None
    return CodedSpec(layer, family, rest.payload.numel(), is_shared, is_scaled, *of_bank)


def stored_parts(coded: BankedExperts) -> dict[str, Tensor]:
    """The tensors of coded experts, by part."""
    rest, bank = coded.rest, coded.bank
    parts = {"payload": rest.payload}
    if isinstance(rest.side, OwnRows):
        side = rest.side
        parts |= {"row_widths": side.packed_widths, "row_scales": side.scales, "expert_scales": side.bases}
    else:
        parts |= {
            "expert_costs": rest.side.expert_costs,
            "input_costs": rest.side.input_costs,
            "expert_scales": rest.side.expert_scales,
            "input_scales": rest.side.input_scales,
        }
    if rest.outputs.exponents is not None:
        parts |= {"output_scales": rest.outputs.exponents}
    if bank is not None:
        assert isinstance(bank.bases.side, OwnRows)
        parts |= {
            "codes": bank.codes,
            "bases_payload": bank.bases.payload,
            "bases_row_widths": bank.bases.side.packed_widths,
            "bases_row_scales": bank.bases.side.scales,
            "bases_scales": bank.bases.side.bases,
        }
    return parts
