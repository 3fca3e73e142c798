"""A causal language model of which memory holds one decoder layer at a time: for models that are larger than memory.

The model's own modules compute, but for its routed experts, which are read one by one when they are run. Its decoder
is a chain: what stands before the layers makes their first input and all that they are told beside it (masks,
positions); every layer is called with the output of the one before; what stands behind them makes logits of the last
output. The first and the last part are run with the layers left out, the layers one by one, each on all tokens before
the next is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.checkpoint.gate_up import fuse_gate_up
from globe.checkpoint.header import FLOAT_DTYPES
from globe.checkpoint.layout import ExpertLayer, source_names
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.stacks import read_expert, read_family
from globe.errors import CheckpointError, UnsupportedModelError
from globe.experts.on_disk import Stack
from globe.model.configuration import expert_layers, explained
from globe.model.empty_model import check_same_experts
from globe.model.expert_modules import ExpertMatrices, RoutedExperts, find_experts
from globe.model.expert_run import run_experts
from globe.model.loading import AGAIN, hollow_language_model, quiet
from globe.model.widened import widen
from globe.terms import FAMILIES, Family

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a layer: the arguments behind the hidden states, and those with names."""


@dataclasses.dataclass
class Passage:
    """Token windows on their way through the layers."""

    hidden: list[Tensor]
    """What the next layer is called with, (N, length, …) for each batch of windows."""
    others: list[list[Call]]
    """What the layers are told beside it, by batch and layer."""

    def through(self, index: int, layer: nn.Module) -> None:
        """Go through one layer."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.output(index, layer, batch)

    def output(self, index: int, layer: nn.Module, batch: int) -> Tensor:
        """What a layer makes of one batch."""
        arguments, keywords = self.others[batch][index]
        return layer(self.hidden[batch], *arguments, **keywords)


class _AtLastLayerError(Exception):
    """The last layer has been reached: what is behind it need not be run."""


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint, read when the loader asks for it."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, _: Any) -> Tensor:
        return self.checkpoint.read(self.name).clone()  # what is read is a view of its file, which stays mapped with it


@dataclasses.dataclass(frozen=True)
class StoredExperts(RoutedExperts):
    """Experts that are read when they are asked for, and computed in float32; their module is empty but for biases."""

    checkpoint: Checkpoint
    stored: ExpertLayer
    place: torch.device
    instead: dict[Family, Stack] = dataclasses.field(default_factory=dict[Family, Stack])
    """Families (E, P, D) that take the place of the checkpoint's."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.place

    def begin(self) -> None:
        """Read those that cannot be read one by one: several in a tensor that is not stored as it is read."""
        if self.stored.layout == "fused" and not self.checkpoint.stored_plainly:
            self.instead.update({family: read_family(self.checkpoint, self.stored, family) for family in FAMILIES})

    def matrices(self, expert: int, dtype: torch.dtype) -> ExpertMatrices:
        held = {family: stack[expert] for family, stack in self.instead.items()}
        others: list[Family] = [family for family in FAMILIES if family not in held]
        held |= read_expert(self.checkpoint, self.stored, expert, others)
        gate, up, down = (held[family].to(self.place, dtype) for family in FAMILIES)
        gate_up = fuse_gate_up(gate, up, 0, interleaved=not self.layout.is_concatenated)
        return ExpertMatrices(gate_up.mT, down, *self.biases(expert, dtype))


class StreamedModel:
    """A dense model, computing in float32 on a device. A quantised source is dequantised as it is read."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        """Read all but the decoder's layers.

        Raises `CheckpointError` for what is missing or does not fit, and as `find_experts` does.
        """
        self.model: Any = hollow_language_model(checkpoint)
        self.device = torch.device(device)
        stored = {layer.index: layer for layer in expert_layers(checkpoint)}
        check_same_experts(stored, found := find_experts(self.model))
        self.experts = {
            each.layer: StoredExperts(
                each.layer, each.path, each.module, each.layout, checkpoint, stored[each.layer], self.device
            )
            for each in found
        }
        for each in self.experts.values():
            each.module.forward = functools.partial(_run, each)
        self._in_files = {
            name for each in stored.values() for family in FAMILIES for name in source_names(each, family)
        }
        self._in_model = {
            f"{each.path}.{name}" for each in self.experts.values() for name in each.layout.dense_parameters
        }
        first = min(self.experts)
        self._checkpoint = checkpoint
        self._stem = self.experts[first].path.partition(f".{first}.")[0]
        self._layers: Any = self.model.get_submodule(self._stem)
        self._conversions: list[Any] = get_model_conversion_mapping(self.model)
        self._names = self._names_by_layer()
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        missing = self._read(None)
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        inner = f"{self._stem}."
        self._rest = {name for name, _ in self.model.named_parameters() if not name.startswith(inner)}
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        wide = {id(each.weight) for each in ends if each is not None and widen(each)}
        self._settle(self.model, self._rest, wide)

    def let_go(self) -> None:
        """Let go of all but the layers: no tokens enter any more, and none leave."""
        for name in self._rest:
            _replace(self.model, name, nn.Parameter(self.model.get_parameter(name).to("meta"), requires_grad=False))

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer with its weights, which are let go afterwards."""
        module: nn.Module = self._layers[index]
        parameters, path = dict(module.named_parameters()), f"{self._stem}.{index}"
        empty = {name: each for name, each in parameters.items() if f"{path}.{name}" not in self._in_model}
        self._read(index)
        if index in self.experts:
            self.experts[index].begin()
        try:
            self._settle(module, empty)
            yield module
        finally:
            if index in self.experts:
                self.experts[index].instead.clear()
            for name, parameter in empty.items():
                _replace(module, name, parameter)

    def enter(self, windows: Tensor, batch: int) -> Passage:
        """Token windows (N, length), so many at a time, before the first layer."""
        entered = [self._enter(ids) for ids in windows.split(batch)]
        return Passage([hidden for hidden, _ in entered], [others for _, others in entered])

    def _enter(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        calls, hidden = list[Call](), list[Tensor]()

        def record(index: int, *arguments: Any, **keywords: Any) -> Tensor:
            if index != len(calls) or not arguments or (hidden and arguments[0] is not hidden[0]):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} cannot be run layer by layer: something stands between its layers"
                )
            hidden[:] = arguments[:1]
            calls.append((arguments[1:], keywords))
            if index == len(self) - 1:
                raise _AtLastLayerError
            return arguments[0]

        with contextlib.suppress(_AtLastLayerError):
            self._run(ids, record)
        return hidden[0], calls

    def leave(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits (N, length, vocabulary) of the last layer's output for these windows."""
        return self._run(ids, lambda index, states, **_: hidden if index == len(self) - 1 else states).logits

    def __len__(self) -> int:
        """Decoder layers."""
        return len(self._layers)

    def _run(self, ids: Tensor, instead: Callable[..., Tensor]) -> Any:
        """Run the model with something else in place of each layer."""
        for index, layer in enumerate(self._layers):
            layer.forward = lambda *arguments, _index=index, **keywords: instead(_index, *arguments, **keywords)
        try:
            return self.model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for layer in self._layers:
                del layer.forward

    def _names_by_layer(self) -> dict[int | None, list[str]]:
        """The checkpoint's tensors by the layer that they belong to, those of no layer under None.

        The model's empty parameters take the dtype that is stored: so they are read, and made float32 one by one.
        """
        renamings = [each for each in self._conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in self._conversions if isinstance(each, WeightConverter)]
        own, prefix = self.model.state_dict(), self.model.base_model_prefix
        number = re.compile(rf"{re.escape(self._stem)}\.(\d+)\.")
        names = defaultdict[int | None, list[str]](list)
        for name, info in self._checkpoint.tensors.items():
            if name in self._in_files:
                continue
            target, _ = rename_source_key(name, renamings, converters, prefix, own)
            if target not in own:  # as transformers does
                target, _ = rename_source_key(name, [], [], prefix, own)
            match = number.match(target)
            names[None if match is None else int(match[1])].append(name)
            if target in own and own[target].is_meta and info.dtype in FLOAT_DTYPES:
                empty = torch.empty(own[target].shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
                _replace(self.model, target, nn.Parameter(empty))
        return names

    def _read(self, layer: int | None) -> set[str]:
        """Have transformers load a layer's tensors, or those of none; returns the names of all that it did not find."""
        tensors = {name: _Stored(self._checkpoint, name) for name in self._names[layer]}
        settings = LoadStateDictConfig(device_map={"": self.device}, weight_mapping=[*self._conversions])
        folder = self._checkpoint.folder
        with explained(f"{folder} cannot be loaded by transformers", AGAIN), quiet():
            found, _ = convert_and_load_state_dict_in_model(self.model, tensors, settings)
            if faults := [*found.conversion_errors.values(), *map(str, found.mismatched_keys)]:
                raise RuntimeError(faults[0][-300:])
        return found.missing_keys

    def _settle(self, module: nn.Module, names: Collection[str], wide: Collection[int] = ()) -> None:
        """Make what was read of a module's parameters constants, float32 but for those with an id in `wide`; raise
        `CheckpointError` for what was not."""
        for name in names:
            parameter = module.get_parameter(name)
            if parameter.is_meta:
                raise CheckpointError(f"{self._checkpoint.folder} lacks {name} of {type(module).__name__}: {AGAIN}")
            parameter.requires_grad_(False)
            if id(parameter) not in wide:
                parameter.data = parameter.data.float()


def _run(experts: StoredExperts, *arguments: Tensor) -> Tensor:
    return run_experts(experts, arguments)


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)
