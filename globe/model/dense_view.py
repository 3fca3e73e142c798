"""A compressed checkpoint seen as the dense one that it stands for; its experts are composed as they are read."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from globe.bank_shape import sides
from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.checkpoint.layout import ExpertLayer, source_names
from globe.checkpoint.manifest import read_manifest
from globe.checkpoint.quantized import quant_method
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.source_layout import read_source_layout
from globe.checkpoint.stacks import check_finite, dense_tensor
from globe.errors import CheckpointError
from globe.experts.decoded import decoded
from globe.experts.on_disk import Stack
from globe.experts.storage import restore
from globe.model.coded_spec import CodedSpec
from globe.model.configuration import expert_layers
from globe.model.empty_model import model_names
from globe.model.factor_check import check_run
from globe.model.quantization_config import read_section
from globe.model.source import open_source
from globe.terms import FAMILIES, Family


@dataclasses.dataclass(frozen=True)
class DenseView(Checkpoint):
    """A compressed checkpoint as its source was: names, dtypes, shapes, shards. Of its experts a layer is in memory."""

    compressed: Checkpoint = dataclasses.field(kw_only=True)
    run: str | None = dataclasses.field(kw_only=True)
    """The compression that it is of."""
    loads_packed: bool = dataclasses.field(kw_only=True)
    """Whether transformers, with GloBE, computes with its experts as they are stored."""
    restored: Callable[[str], Tensor] = dataclasses.field(kw_only=True)
    """From a name to its tensor, in any dtype."""

    @property
    def stored_plainly(self) -> bool:
        """The files' bytes are not the tensors'."""
        return False

    @property
    def files(self) -> Checkpoint:
        """As the files are."""
        return self.compressed

    @property
    def is_composed(self) -> bool:
        """Those in GloBE's own format."""
        return self.loads_packed

    @property
    def loaded_bytes(self) -> int:
        """Of its tensors, or of what they are composed from, when they are loaded."""
        return self.compressed.loaded_bytes if self.loads_packed else super().loaded_bytes

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each in turn; `CheckpointError` for what is not as config.json says."""
        for name in names:
            yield name, self.restored(name).to(TORCH_DTYPES[self._info(name).dtype])  # a layer may have several

    def fingerprint(self) -> str:
        """That of the files."""
        return self.files.fingerprint()


def dense_view(compressed: Checkpoint, scratch: Path | None = None) -> DenseView:
    """What a compressed checkpoint stands for: composed in float32, and rounded once to the source's dtype, as the
    compressed model composes it when it is loaded in that dtype. The layer that is read waits in the folder `scratch`
    where it is large, if there is one.

    Raises `CheckpointError` for one that GloBE did not write, or that is not whole.
    """
    if quant_method(compressed) == "compressed-tensors":
        manifest = read_manifest(compressed.folder)
        run, is_native, restored = manifest and manifest.run, False, open_source(compressed.folder).read
    else:
        run, is_native, restored = read_section(compressed).run, True, _Composer(compressed, scratch).tensor
    source = read_source_layout(compressed)
    return DenseView(
        source.folder,
        source.config,
        source.tensors,
        source.shards,
        compressed=compressed,
        run=run,
        loads_packed=is_native,
        restored=restored,
    )


class _Composer:
    """Composes the tensors of a checkpoint in GloBE's own format."""

    def __init__(self, compressed: Checkpoint, scratch: Path | None) -> None:
        self._config, self._compressed, self._scratch = read_section(compressed), compressed, scratch
        source = read_source_layout(compressed)
        check_run(map(compressed.shard_path, compressed.shards), self._config.run)
        self._names = model_names(source)
        self._tripwire = self._names.tripwire(self._config.compressed)
        self._layers = {layer.index: layer for layer in expert_layers(source)}
        self._held = defaultdict[str, list[tuple[int, Family]]](list)
        for layer in self._layers.values():
            for family in FAMILIES:
                for name in source_names(layer, family):
                    self._held[name].append((layer.index, family))
        self._banks = {
            (layer, family): bank for bank in self._config.banks for layer in bank.layers for family in bank.families
        }
        self._coded = {(spec.layer, spec.family): spec for spec in self._config.coded}
        if missing := sorted(source.tensors.keys() - compressed.tensors.keys() - self._held.keys()):
            raise CheckpointError(
                f"{compressed.folder} lacks {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}, which its "
                "source had; save_pretrained leaves tied weights out: give the folder that globe compress wrote"
            )
        self._family = functools.lru_cache(maxsize=len(FAMILIES))(self._compose_family)

    def tensor(self, name: str) -> Tensor:
        """The tensor that the source calls `name`."""
        if name in self._compressed.tensors and name != self._tripwire:
            return self._compressed.read(name)
        held = self._held[name]
        layer = self._layers[held[0][0]]
        return dense_tensor(layer, name, {family: self._family(index, family) for index, family in held})

    def _compose_family(self, index: int, family: Family) -> Stack:
        bank, layer, names = self._banks.get((index, family)), self._layers[index], self._names
        E, P, D = layer.num_experts, layer.intermediate_size, layer.hidden_size
        if spec := self._coded.get((index, family)):
            return self._decode(spec, layer)
        if bank is None:
            return self._factor(names.dense(index, family), (E, P, D))
        shape = bank.shape(layer)
        adapters = self._factor(names.adapters(index, family), shape.adapters)
        codes = self._factor(names.codes(index, family), shape.codes)
        bases = self._factor(names.bases(bank), shape.bases)
        with torch.no_grad():
            stack = restore(adapters, codes, bases, self._config.activation)
        return stack.to(TORCH_DTYPES[layer.dtype])

    def _decode(self, spec: CodedSpec, layer: ExpertLayer) -> Stack:
        """Coded experts (E, P, D), rounded to the source's dtype; `CheckpointError` unless what is stored is what
        config.json says and fits itself."""
        num_inputs, num_outputs = sides(layer, spec.family)
        parts: dict[str, Tensor] = {}
        for part, (shape, dtype) in spec.shapes((layer.num_experts, num_inputs, num_outputs)).items():
            name = self._names.coded(spec.layer, spec.family, part)
            parts[part] = held = self._compressed.read(name)
            if held.shape != shape or held.dtype != dtype:
                raise CheckpointError(
                    f"{name} is {held.dtype} of shape {tuple(held.shape)}; config.json describes {dtype} of {shape}: "
                    "fetch the checkpoint again"
                )
        coded = spec.experts(parts, num_outputs)
        if not coded.is_sound():
            raise CheckpointError(f"rows and paths of {spec.name} do not fit each other: fetch the checkpoint again")
        return decoded(spec.family, coded, TORCH_DTYPES[layer.dtype], self._scratch)

    def _factor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A held factor; `CheckpointError` unless it is what config.json says, and finite."""
        factor = self._compressed.read(name)
        if factor.shape != shape or not factor.is_floating_point():
            raise CheckpointError(
                f"{name} is {factor.dtype} of shape {tuple(factor.shape)}; config.json describes {shape}: "
                "fetch the checkpoint again"
            )
        check_finite(factor, name)
        return factor
