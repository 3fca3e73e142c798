"""From a compressed checkpoint back to a dense one: the source's names, dtypes and shards, for any server."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from globe.bank_shape import sides
from globe.checkpoint.card import CARD, EXPORT, carried_card, describe_export, export_metadata, write_dense_card
from globe.checkpoint.evaluation import EVALUATION, read_evaluations
from globe.checkpoint.header import TORCH_DTYPES
from globe.checkpoint.layout import ExpertLayer, source_names
from globe.checkpoint.manifest import MANIFEST, read_manifest, verify_model
from globe.checkpoint.quantized import quant_method
from globe.checkpoint.reader import INDEX, SINGLE, Checkpoint, open_checkpoint
from globe.checkpoint.report import REPORT, Report
from globe.checkpoint.shipped import resolve_model
from globe.checkpoint.side_files import CONFIG
from globe.checkpoint.source_layout import SOURCE_LAYOUT, read_source_layout
from globe.checkpoint.stacks import check_finite, dense_tensor
from globe.checkpoint.writer import (
    copy_side_files,
    make_folder,
    require_space,
    save_tensors,
    write_file,
    write_index,
    write_json,
)
from globe.errors import CheckpointError
from globe.experts.storage import restore
from globe.model.coded_spec import CodedSpec
from globe.model.configuration import expert_layers, in_json
from globe.model.empty_model import model_names
from globe.model.factor_check import check_run
from globe.model.loading import open_source
from globe.model.names import FactorNames
from globe.model.quantization_config import read_section
from globe.plan.recipe import recipe_text
from globe.run.folder import RunFolder, open_run
from globe.terms import FAMILIES, Family


def export_dense(model: str | Path, output: str | Path, *, overwrite: bool = False, verify: bool = True) -> Path:
    """Compose the experts of a compressed model and write them as the source had them; returns `output`.

    Names, dtypes, shapes and shards are the source's, untouched tensors bit for bit, and `quantization_config` is gone:
    the result needs no GloBE. That it is lossy, and of what, is said in its card, its config.json and the metadata of
    its shards. Its experts are composed in float32 and rounded once to the source's dtype, as the
    compressed model composes them when it is loaded in that dtype. One shard is in memory at a time. The model's files
    are verified first, where they have a manifest, unless `verify` is off; an export that was interrupted starts over.
    With `overwrite`, an output that GloBE wrote earlier is replaced when the new one is whole.

    Raises `CheckpointError` if the model is not compressed or damaged, `OutputError` if the output exists or does not
    fit the disk.
    """
    compressed = open_checkpoint(resolve_model(model))
    dense = (UnpackedView if quant_method(compressed) == "compressed-tensors" else DenseView)(compressed)
    if verify:
        verify_model(compressed.folder)
    run = {"command": "export", "source": str(model), "fingerprint": compressed.fingerprint()}
    with open_run(Path(output), run, overwrite=overwrite, source=compressed.folder) as folder:
        if not folder.whole():
            _write(dense, folder)
        folder.publish()
    return folder.output


def _write(dense: DenseView | UnpackedView, folder: RunFolder) -> None:
    """All files of the export."""
    source, compressed, path = dense.source, dense.compressed, folder.path
    num_bytes = sum(tensor.nbytes for tensor in source.tensors.values())
    require_space(path, num_bytes)
    report = Report.read(compressed.folder) if (compressed.folder / REPORT).is_file() else None
    description = describe_export(report, dense.run)
    files: dict[str, str] = {}
    for shard in source.shards:
        make_folder((path / shard).parent)
        tensors = {tensor.name: dense.tensor(tensor.name) for tensor in source.shard_tensors(shard)}
        files[shard] = save_tensors(path / shard, tensors, export_metadata(description))
    if source.shards != (SINGLE,):
        weight_map = {tensor.name: tensor.shard for tensor in source.tensors.values()}
        files[INDEX] = write_index(path, weight_map, num_bytes)
    files |= copy_side_files(compressed, path, leave_out=(REPORT, SOURCE_LAYOUT, MANIFEST, EVALUATION))
    files[CONFIG] = write_json(path / CONFIG, {**in_json(source.config), EXPORT: description})
    if report is not None:
        recipe = recipe_text(report.source, report.commit, report.config, report.versions.get("globe", ""))
        card = write_dense_card(report, carried_card(compressed), recipe, read_evaluations(compressed.folder))
        files[CARD] = write_file(path / CARD, card)
    open_checkpoint(path)
    folder.complete(files)


class UnpackedView:
    """An output in the format of compressed-tensors seen as its dense source; its experts are dequantised in float32.

    Raises `CheckpointError` for one that GloBE did not write.
    """

    def __init__(self, compressed: Checkpoint) -> None:
        self.compressed, self.source = compressed, read_source_layout(compressed)
        self.run = None if (manifest := read_manifest(compressed.folder)) is None else manifest.run
        self._plain = open_source(compressed.folder)

    def tensor(self, name: str) -> Tensor:
        """The tensor that the source calls `name`, in the source's dtype."""
        return self._plain.read(name).to(TORCH_DTYPES[self.source.tensors[name].dtype])


class DenseView:
    """A compressed checkpoint seen as its dense source."""

    def __init__(self, compressed: Checkpoint) -> None:
        self._config = read_section(compressed)
        self.compressed = compressed
        self.run = self._config.run
        self.source = read_source_layout(compressed)
        check_run([compressed.folder / shard for shard in compressed.shards], self._config.run)
        self._names = model_names(self.source)
        self._layers = {layer.index: layer for layer in expert_layers(self.source)}
        self._owner = {
            name: (layer.index, family)
            for layer in self._layers.values()
            for family in FAMILIES
            for name in source_names(layer, family)
        }
        self._banks = {
            (layer, family): bank for bank in self._config.banks for layer in bank.layers for family in bank.families
        }
        self._coded = {(spec.layer, spec.family): spec for spec in self._config.coded}
        held = self.compressed.tensors.keys() | self._owner.keys()
        if missing := sorted(self.source.tensors.keys() - held):
            raise CheckpointError(
                f"{compressed.folder} lacks {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}, which its "
                "source had; save_pretrained leaves tied weights out: export the folder that globe compress wrote"
            )
        self._family = functools.lru_cache(maxsize=len(FAMILIES))(self._compose_family)

    def tensor(self, name: str) -> Tensor:
        """The tensor that the source calls `name`, in the source's dtype."""
        tripwire = self._names.tripwire(self._config.compressed)
        if name in self.compressed.tensors and name != tripwire:
            return self.compressed.read(name)
        index, _ = self._owner[name]
        layer = self._layers[index]
        held: list[Family] = [family for family in FAMILIES if name in source_names(layer, family)]
        tensor = dense_tensor(layer, name, {family: self._family(index, family) for family in held})
        return tensor.to(TORCH_DTYPES[self.source.tensors[name].dtype])  # a layer may have several

    def _compose_family(self, index: int, family: Family) -> Tensor:
        bank, layer, names = self._banks.get((index, family)), self._layers[index], self._names
        E, P, D = layer.num_experts, layer.intermediate_size, layer.hidden_size
        if spec := self._coded.get((index, family)):
            return self._decode(spec, names, layer).to(TORCH_DTYPES[layer.dtype])
        if bank is None:
            return self._factor(names.dense(index, family), (E, P, D))
        shape = bank.shape(layer)
        adapters = self._factor(names.adapters(index, family), shape.adapters)
        codes = self._factor(names.codes(index, family), shape.codes)
        bases = self._factor(names.bases(bank), shape.bases)
        with torch.no_grad():
            stack = restore(adapters, codes, bases, self._config.activation)
        return stack.to(TORCH_DTYPES[layer.dtype])

    def _decode(self, spec: CodedSpec, names: FactorNames, layer: ExpertLayer) -> Tensor:
        """Coded experts (E, P, D); `CheckpointError` unless what is stored is what config.json says and fits itself."""
        num_inputs, num_outputs = sides(layer, spec.family)
        parts: dict[str, Tensor] = {}
        for part, (shape, dtype) in spec.shapes((layer.num_experts, num_inputs, num_outputs)).items():
            name = names.coded(spec.layer, spec.family, part)
            parts[part] = held = self.compressed.read(name)
            if held.shape != shape or held.dtype != dtype:
                raise CheckpointError(
                    f"{name} is {held.dtype} of shape {tuple(held.shape)}; config.json describes {dtype} of {shape}: "
                    "fetch the checkpoint again"
                )
        coded = spec.experts(parts, num_outputs)
        if not coded.is_sound():
            raise CheckpointError(f"rows and paths of {spec.name} do not fit each other: fetch the checkpoint again")
        return coded.decode() if spec.family == "down" else coded.decode().mT

    def _factor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A held factor; `CheckpointError` unless it is what config.json says, and finite."""
        factor = self.compressed.read(name)
        if factor.shape != shape or not factor.is_floating_point():
            raise CheckpointError(
                f"{name} is {factor.dtype} of shape {tuple(factor.shape)}; config.json describes {shape}: "
                "fetch the checkpoint again"
            )
        check_finite(factor, name)
        return factor
