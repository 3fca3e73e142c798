"""What a compressed checkpoint holds: bytes by kind of tensor beside the source's, and spectra of its factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer, source_names
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.source_layout import read_source_layout
from globe.checkpoint.stacks import check_finite
from globe.errors import CheckpointError
from globe.model.bank_spec import BankSpec
from globe.model.configuration import expert_layers
from globe.model.empty_model import model_names
from globe.model.names import FactorNames, is_factor
from globe.model.quantization_config import read_section
from globe.terms import FAMILIES

T = TypeVar("T")
_MAX_BANKS, _MAX_STACKS, _MAX_EXPERTS = 6, 3, 8
_CHUNK = 1 << 22

ROUTED = "routed experts, as matrices"
_KINDS = (
    ("shared_expert", "shared experts"),
    ("shared_mlp", "shared experts"),
    ("attn", "attention"),
    ("attention", "attention"),
    ("embed", "embeddings and output"),
    ("lm_head", "embeddings and output"),
    ("norm", "norms"),
    ("router", "routers"),
    ("mlp.gate.", "routers"),
    ("block_sparse_moe.gate.", "routers"),
)
_FACTORS = (
    ("_adapters", "adapters"),
    ("_codes", "codes"),
    (".bases", "bases"),
    ("_payload", "coded experts"),
    ("_widths", "widths and scales"),
    ("_costs", "widths and scales"),
    ("_scales", "widths and scales"),
)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Of the tensors of one kind."""

    kind: str
    before: int
    after: int


def bytes_by_kind(compressed: Checkpoint) -> list[Bytes]:
    """Bytes of all tensors by kind, in the source and in the compressed model, the largest first.

    Raises `CheckpointError` if the folder has no readable record of its source.
    """
    source = read_source_layout(compressed)
    routed = {name for layer in expert_layers(source) for family in FAMILIES for name in source_names(layer, family)}
    before, after = dict[str, int](), dict[str, int]()
    for checkpoint, sizes in ((source, before), (compressed, after)):
        for tensor in checkpoint.tensors.values():
            kind = _kind(tensor.name, routed)
            sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
    kinds = [Bytes(kind, before.get(kind, 0), after.get(kind, 0)) for kind in {**before, **after}]
    return sorted(kinds, key=lambda entry: -max(entry.before, entry.after))


def _kind(name: str, routed: set[str]) -> str:
    if is_factor(name):
        return next((kind for part, kind in _FACTORS if part in name), ROUTED)
    if name in routed or ".experts." in name:
        return ROUTED
    return next((kind for part, kind in _KINDS if part in name), "other")


@dataclasses.dataclass(frozen=True)
class Spectra:
    """Singular values of a bank's factors, each divided by the largest of its matrix, in descending order."""

    bank: BankSpec
    bases: list[float]
    """Of the bases as an M x R·D matrix."""
    codes: list[float]
    """Of the codes of all its experts, E x M."""
    adapters: list[float]
    """Of the adapters, P x R each: the median over some experts."""


def read_spectra(compressed: Checkpoint) -> Iterator[Spectra]:
    """Spectra of at most six banks, evenly spaced; adapters of at most eight experts of three layers and families each.

    Raises `CheckpointError` for factors that are missing, of another shape than config.json says, or not finite.
    """
    banks = read_section(compressed).banks
    source = read_source_layout(compressed)
    names = model_names(source)
    layers = {layer.index: layer for layer in expert_layers(source)}
    for bank in _some(banks, _MAX_BANKS):
        if unknown := [layer for layer in bank.layers if layer not in layers or layer not in names.experts]:
            raise CheckpointError(
                f"config.json has bank {bank.name} for layers {unknown}, where the source has no experts"
            )
        yield _spectra(compressed, names, bank, layers)


def _spectra(compressed: Checkpoint, names: FactorNames, bank: BankSpec, layers: Mapping[int, ExpertLayer]) -> Spectra:
    def read(name: str, shape: tuple[int, ...], chosen: Sequence[int] | None = None) -> Tensor:
        stored = compressed.read(name)
        if stored.shape != shape or not stored.is_floating_point():
            raise CheckpointError(f"{name} is {stored.dtype} of shape {tuple(stored.shape)}; config.json says {shape}")
        factor = (stored if chosen is None else stored[chosen]).float()
        check_finite(factor, name)
        return factor

    stacks = [(layer, family) for layer in bank.layers for family in bank.families]
    shapes = {layer: bank.shape(layers[layer]) for layer in bank.layers}
    codes = [read(names.codes(layer, family), shapes[layer].codes) for layer, family in stacks]
    adapters = [
        read(
            names.adapters(layer, family),
            shapes[layer].adapters,
            _some(range(shapes[layer].num_matrices), _MAX_EXPERTS),
        )
        for layer, family in _some(stacks, _MAX_STACKS)
    ]
    bases = read(names.bases(bank), shapes[bank.layers[0]].bases)
    return Spectra(
        bank,
        singular_values(bases.flatten(1)).tolist(),
        singular_values(torch.cat(codes)).tolist(),
        singular_values(torch.cat(adapters)).median(0).values.tolist(),
    )


def singular_values(matrices: Tensor) -> Tensor:
    """Of (…, rows, columns), in descending order over the largest, from the Gram matrix of the shorter side; float64.

    Exact to about 1e-8 of the largest.
    """
    if matrices.shape[-1] < matrices.shape[-2]:
        matrices = matrices.mT
    gram = matrices.new_zeros(*matrices.shape[:-1], matrices.shape[-2], dtype=torch.float64)
    for part in matrices.split(max(1, _CHUNK * matrices.shape[-1] // max(1, matrices.numel())), -1):
        wide = part.double()
        gram += wide @ wide.mT
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(-1)
    return values / values[..., :1].clamp_min(torch.finfo(torch.float64).tiny)


def _some(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]
