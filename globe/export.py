"""From a compressed checkpoint back to a dense one: the source's names, dtypes and shards, for any server."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from globe.checkpoint.header import TORCH_DTYPES
from globe.checkpoint.layout import FAMILIES, Family, find_expert_layers, source_names
from globe.checkpoint.reader import CONFIG, SINGLE, Checkpoint, open_checkpoint
from globe.checkpoint.stacks import dense_tensor
from globe.checkpoint.writer import claim, copy_side_files, finish, require_space, save_tensors, write_index, write_json
from globe.empty_model import model_names
from globe.errors import CheckpointError, OutputError
from globe.experts import restore
from globe.model.quantization_config import read_section
from globe.report import REPORT
from globe.shipped import resolve_model
from globe.source_layout import SOURCE_LAYOUT, read_source_layout


def export_dense(model: str | Path, output: str | Path) -> Path:
    """Compose the experts of a compressed model and write them as the source had them; returns `output`.

    Names, dtypes, shapes and shards are the source's, untouched tensors bit for bit, and `quantization_config` is gone:
    the result needs no GloBE. Its experts are composed in float32 and rounded once to the source's dtype, as the
    compressed model composes them when it is loaded in that dtype. One shard is in memory at a time.

    Raises `CheckpointError` if the model is not compressed or damaged, `OutputError` if the output exists or does not
    fit the disk.
    """
    output = Path(output)
    compressed = open_checkpoint(resolve_model(model))
    dense = DenseView(compressed)
    partial = claim(output)
    if any(partial.iterdir()):
        raise OutputError(f"{partial} is left from an interrupted export: remove it and run again")
    require_space(partial, sum(tensor.nbytes for tensor in dense.source.tensors.values()))
    for shard in dense.source.shards:
        save_tensors(partial / shard, {t.name: dense.tensor(t.name) for t in dense.source.shard_tensors(shard)})
    if dense.source.shards != (SINGLE,):
        weight_map = {tensor.name: tensor.shard for tensor in dense.source.tensors.values()}
        write_index(partial, weight_map, sum(tensor.nbytes for tensor in dense.source.tensors.values()))
    copy_side_files(compressed, partial, leave_out=(REPORT, SOURCE_LAYOUT))
    write_json(partial / CONFIG, dense.source.config)
    open_checkpoint(partial)
    finish(partial, output)
    return output


class DenseView:
    """A compressed checkpoint seen as its dense source."""

    def __init__(self, compressed: Checkpoint) -> None:
        self._config = read_section(compressed)
        self.compressed = compressed
        self.source = read_source_layout(compressed)
        self._names = model_names(self.source)
        self._layers = {layer.index: layer for layer in find_expert_layers(self.source)}
        self._owner = {
            name: (layer.index, family)
            for layer in self._layers.values()
            for family in FAMILIES
            for name in source_names(layer, family)
        }
        self._banks = {
            (layer, family): bank for bank in self._config.banks for layer in bank.layers for family in bank.families
        }
        held = self.compressed.tensors.keys() | self._owner.keys()
        if missing := sorted(self.source.tensors.keys() - held):
            raise CheckpointError(
                f"{compressed.folder} lacks {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}, which its "
                "source had; save_pretrained leaves tied weights out: export the folder that globe compress wrote"
            )
        self._family = functools.lru_cache(maxsize=len(FAMILIES))(self._compose_family)

    def tensor(self, name: str) -> Tensor:
        """The tensor that the source calls `name`, in the source's dtype."""
        tripwire = self._names.tripwire(self._config.banks)
        if name in self.compressed.tensors and name != tripwire:
            return self.compressed.read(name)
        index, _ = self._owner[name]
        layer = self._layers[index]
        held: list[Family] = [family for family in FAMILIES if name in source_names(layer, family)]
        return dense_tensor(layer, name, {family: self._family(index, family) for family in held})

    def _compose_family(self, index: int, family: Family) -> Tensor:
        bank = self._banks.get((index, family))
        if bank is None:
            return self.compressed.read(self._names.dense(index, family))
        read = self.compressed.read
        factors = (read(self._names.adapters(index, family)), read(self._names.codes(index, family)))
        shape = bank.num_bases, bank.rank, self._layers[index].hidden_size
        with torch.no_grad():
            stack = restore(*factors, read(self._names.bases(bank)), self._config.activation, shape, bank.precision)
        return stack.to(TORCH_DTYPES[self._layers[index].dtype])
