"""What the headers of a source and the settings say of a compression, before anything else is read or built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from globe.bank_shape import sides
from globe.checkpoint.compressed_tensors import WIDTHS, layer_bytes
from globe.checkpoint.header import item_bytes
from globe.checkpoint.layout import ExpertLayer, LanguageModel, find_expert_layers, source_names, stated_model
from globe.checkpoint.quantized import dequantized, refuse_unread
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.shipped import resolve_model
from globe.errors import SettingsError
from globe.measure.runs import is_compensated
from globe.model.names import dense_halves
from globe.model.source import open_known
from globe.plan.budget import Bits
from globe.plan.scopes import Scope, make_plan
from globe.plan.settings import CompressConfig
from globe.quant.sizes import LONG_ROW, MOST_WEIGHTS, side_bytes
from globe.terms import Family

PLANNING_PASSES = 3
"""Of `plan_coding` through all experts, where no bank pays."""
_FACTOR_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class Outline:
    """What the headers of a source and the settings say of a compression."""

    source: str
    """The model as it was named."""
    checkpoint: Checkpoint
    config: CompressConfig
    """Resolved."""
    layers: Mapping[int, ExpertLayer]
    """By number, those that hold experts."""
    scopes: tuple[Scope, ...]
    """Every bank with the same share of the budget."""

    def factor_dtype(self, layer: int) -> str:
        """What a layer's factors in floating point are stored in, as safetensors calls it."""
        return _FACTOR_DTYPES.get(self.config.factor_dtype, self.layers[layer].dtype)

    def predicted_bytes(self, scopes: Sequence[Scope], coded: int | None = None) -> int:
        """Of the output's tensors, with banks as in `scopes`, and `coded` bytes where experts are coded: as long as
        that is not known, their budget."""
        return self.kept_bytes() + self.made_bytes(scopes, coded)

    def kept_bytes(self) -> int:
        """Of the tensors that stay as they are."""
        return sum(self.checkpoint.tensors[name].nbytes for names in self.kept().values() for name in names)

    def made_bytes(self, scopes: Sequence[Scope], coded: int | None = None) -> int:
        """Of the others, as `predicted_bytes` has it."""
        made, budget = 0, self.config.budget
        if not self.config.is_packed:
            made += item_bytes(self.factor_dtype(self.scopes[0].layers[0]))  # the tripwire
        if isinstance(budget, Bits):
            made += budget.num_bytes(self.original_parameters()) if coded is None else coded
        factors = sum(
            bank.shape.parameters * item_bytes(self.factor_dtype(bank.layers[0]))
            for scope in scopes
            for bank in scope.banks
        )
        halves = sum(
            layer.num_experts * layer.intermediate_size * layer.hidden_size * item_bytes(layer.dtype)
            for scope in scopes
            for layer in (self.layers[index] for index in scope.layers)
            for _ in dense_halves(self.config.families)
        )
        return made + factors + halves

    def waiting_bytes(self) -> int:
        """That lie on disk beside the output for a while: of layers that are run as they are coded."""
        layers = [self.layers[index] for scope in self.scopes for index in scope.layers]
        return waiting_bytes(layers, len(self.config.families)) if is_compensated(self.config) else 0

    def original_bytes(self) -> int:
        """Of the source's tensors."""
        return sum(tensor.nbytes for tensor in self.checkpoint.tensors.values())

    def original_parameters(self) -> int:
        """Of the families to be compressed."""
        layers = [self.layers[index] for scope in self.scopes for index in scope.layers]
        return len(self.config.families) * sum(
            layer.num_experts * layer.intermediate_size * layer.hidden_size for layer in layers
        )

    def least_packed_bits(self) -> float:
        """In the format of compressed-tensors: stored bits of a weight with all layers in the least width, rounded
        up."""
        layers = [self.layers[index] for scope in self.scopes for index in scope.layers]
        bits = 8 * sum(layer_bytes(layer, WIDTHS[0]) for layer in layers) / self.original_parameters()
        return math.ceil(1000 * bits) / 1000

    def compressed(self) -> list[tuple[int, Family]]:
        """Layer and family of all that is compressed."""
        return [(index, family) for scope in self.scopes for index in scope.layers for family in self.config.families]

    def kept(self) -> dict[str, list[str]]:
        """The tensors that stay as they are, by shard; shards that keep none are left out."""
        replaced = {name for scope in self.scopes for index in scope.layers for name in self._sources(index)}
        kept = {
            shard: [t.name for t in self.checkpoint.shard_tensors(shard) if t.name not in replaced]
            for shard in self.checkpoint.shards
        }
        return {shard: names for shard, names in kept.items() if names}

    def factor_files(self, number: int) -> list[str]:
        """The output's files with the factors of a scope: one, or one for each layer where layers are streamed."""
        counts = [len(scope.layers) if self.config.stream else 1 for scope in self.scopes]
        first, total = sum(counts[:number]), sum(counts) + len(self.kept())
        return [_file(first + piece, total) for piece in range(counts[number])]

    def kept_files(self) -> dict[str, str]:
        """The output's files with the tensors that stay, by the shard that they come from."""
        before, kept = sum(len(self.factor_files(number)) for number in range(len(self.scopes))), self.kept()
        return {shard: _file(before + offset, before + len(kept)) for offset, shard in enumerate(kept)}

    def _sources(self, index: int) -> list[str]:
        """The layer's source tensors that the output replaces: of its families in banks and of the dense halves."""
        families: set[Family] = {*self.config.families, *dense_halves(self.config.families)}
        return [name for family in families for name in source_names(self.layers[index], family)]


def outline(
    model: str | Path,
    config: CompressConfig,
    revision: str | None = None,
    cache: Path | None = None,
    passing: Path | None = None,
) -> Outline:
    """Open the source, as `open_checkpoint` does, and lay settings and headers side by side; nothing else is read and
    no model is built.

    Raises `CheckpointError` for what cannot be read, `UnsupportedModelError` and `SettingsError` as `compress` does.
    """
    return confirmed(first_look(model, config, revision, cache, passing))


def first_look(
    model: str | Path,
    config: CompressConfig,
    revision: str | None = None,
    cache: Path | None = None,
    passing: Path | None = None,
) -> Outline:
    """What config.json itself and the headers say, without transformers, which takes seconds to import, unless it has
    to fill in what config.json leaves out. Whether it accepts the model, `confirmed` tells."""
    checkpoint = open_known(resolve_model(model), revision, cache, passing)
    refuse_unread(checkpoint)
    source = str(model).encode(errors="backslashreplace").decode()  # a path that is not UTF-8
    stated = stated_model(checkpoint.config) or _language_model(checkpoint)
    return _laid_out(source, checkpoint, stated, config)


def confirmed(outlined: Outline) -> Outline:
    """The outline itself where config.json means to transformers what it says, else as transformers understands it.

    Raises as `outline` does where transformers does not accept the model.
    """
    from globe.model.configuration import check_routing

    files = outlined.checkpoint.files
    stated, model = stated_model(files.config), _language_model(files)
    if stated is not None and model != stated:
        outlined = _laid_out(outlined.source, files, model, outlined.config)
    check_routing(files, outlined.layers.values())
    return outlined


def _language_model(checkpoint: Checkpoint) -> LanguageModel:
    from globe.model.configuration import language_model

    return language_model(checkpoint)


def _laid_out(source: str, files: Checkpoint, model: LanguageModel, config: CompressConfig) -> Outline:
    """Settings and headers side by side."""
    checkpoint, resolved = dequantized(files, model.dtype), config.resolved()
    if checkpoint.is_passing and not resolved.is_coded:
        raise SettingsError("low_disk is for bits: banks in floating point go through the source at every step")
    layers = {layer.index: layer for layer in find_expert_layers(checkpoint, model)}
    found = Outline(source, checkpoint, resolved, layers, tuple(make_plan(list(layers.values()), resolved)))
    if config.is_packed and config.bits is None:
        return dataclasses.replace(found, config=dataclasses.replace(resolved, bits=found.least_packed_bits()))
    return found


def waiting_bytes(layers: Iterable[ExpertLayer], num_families: int) -> int:
    """Of the largest layer whose decoded families wait on disk, each of which has too many weights for memory."""
    weights = [(each.num_experts * each.intermediate_size * each.hidden_size, each.dtype) for each in layers]
    large = [count * item_bytes(dtype) for count, dtype in weights if count > MOST_WEIGHTS]
    return num_families * max(large, default=0)


def check_reach(outlined: Outline) -> None:
    """Raise `SettingsError` where the least that is stored beside paths takes all the bits that are asked for."""
    layers = [outlined.layers[index] for scope in outlined.scopes for index in scope.layers]
    side = sum(_least_side_bytes(layer, family) for layer in layers for family in outlined.config.families)
    least = 8 * side / outlined.original_parameters()
    if isinstance(outlined.config.budget, Bits) and outlined.config.budget.per_weight < least:
        raise out_of_reach(outlined.config.budget, least)


def out_of_reach(budget: Bits, least: float) -> SettingsError:
    """What to raise where widths and scales alone take `least` bits a weight."""
    return SettingsError(
        f"bits {budget.per_weight:g} is out of reach: widths and scales of experts this small take {least:.2f} bits "
        "a weight; choose more, or keep"
    )


def _least_side_bytes(layer: ExpertLayer, family: Family) -> int:
    num_inputs, num_outputs = sides(layer, family)
    forms = (False,) if num_outputs >= LONG_ROW else (False, True)
    return min(side_bytes(layer.num_experts, num_inputs, is_shared) for is_shared in forms)


def _file(number: int, total: int) -> str:
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"
