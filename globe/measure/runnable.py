"""Whether a model can be run here, beside being read, and where."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from globe.checkpoint.header import item_bytes
from globe.checkpoint.layout import is_of_experts
from globe.checkpoint.quantized import DequantizedCheckpoint
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.shards import layer_of
from globe.machine.memory import total_memory
from globe.units import byte_size

MEMORY_SHARE = 0.5
"""Largest share of the memory, the machine's or the device's, that the weights of a model to be run may take."""
STREAMED_SHARE = 0.8
"""The same of what is in memory at once of a model that is run a layer at a time."""
LAYERS_AT_ONCE = 2.5
"""Of such a model, in float32 and without experts: one is made of what was read of it, or has gradients as large."""
COPIES_AT_ONCE = 4
"""Of the largest tensor of experts, in float32: read, converted, and multiplied."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model can be run."""

    device: str | None
    """None: nowhere here."""
    obstacle: str | None
    """Why not where, or not as, that was asked for."""
    is_streamed: bool = False
    """Run a layer at a time, its weights read as they are reached."""


def find_place(checkpoint: Checkpoint, device: str, itemsize: int | None = None, *, stays: bool = False) -> Place:
    """Where the model can be run with weights of `itemsize` bytes each (None: as they are stored).

    As a whole, on the device if its memory allows, else on the CPU if that does, unless the model `stays`; else a layer
    at a time, in float32, on the first of them that has room for that.
    """
    needed = checkpoint.loaded_bytes
    if itemsize is not None:
        needed = sum(itemsize * math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    candidates = {candidate: total_memory(candidate) for candidate in dict.fromkeys((device, "cpu"))}
    bounds = list[str]()
    if isinstance(checkpoint, DequantizedCheckpoint):
        obstacle = "the source is quantised"
    elif checkpoint.is_passing:
        obstacle = "the disk is to hold a part of the source at a time"
    else:
        for candidate in [device] if stays else candidates:
            memory, bound = candidates[candidate]
            if needed <= MEMORY_SHARE * memory:
                return Place(candidate, _obstacle(needed, bounds) if bounds else None)
            bounds.append(bound)
        obstacle = _obstacle(needed, bounds)
    at_once, bounds = bytes_at_once(checkpoint), []
    for candidate, (memory, bound) in candidates.items():
        if at_once <= STREAMED_SHARE * memory:
            return Place(candidate, obstacle, is_streamed=True)
        bounds.append(bound)
    least = f"a layer at a time it takes {byte_size(at_once)}, over {STREAMED_SHARE:.0%} of what there is"
    return Place(None, f"{obstacle}; {least}: {', '.join(bounds)}")


def has_room(checkpoint: Checkpoint, place: Place, processes: int) -> bool:
    """Whether the model is run a layer at a time, and so many processes of this machine can do so at that place; of
    GPUs each has its own."""
    if place.device is None or not place.is_streamed:
        return False
    memory, _ = total_memory(place.device)
    return bytes_at_once(checkpoint) * (processes if place.device == "cpu" else 1) <= STREAMED_SHARE * memory


def bytes_at_once(checkpoint: Checkpoint) -> int:
    """Of a model that is run a layer at a time: all outside of its layers, the largest of these as often as it is there
    at once, and of its experts one, or all where they are dequantised or composed together."""
    layers, together = Counter[str](), Counter[str]()
    outside = largest = 0
    for tensor in checkpoint.tensors.values():
        layer, wide = layer_of(tensor.name), item_bytes("F32") * math.prod(tensor.shape)
        if is_of_experts(tensor.name):
            is_stack = len(tensor.shape) > 2
            largest = max(largest, wide // tensor.shape[0] if is_stack else wide)
            together[layer] += tensor.nbytes if is_stack and not checkpoint.stored_plainly else 0
            together[layer] += wide if checkpoint.is_composed else 0
        elif layer:
            layers[layer] += wide
        else:
            outside += tensor.nbytes if len(tensor.shape) > 1 else wide
    of_layers = math.ceil(LAYERS_AT_ONCE * max(layers.values(), default=0)) + max(together.values(), default=0)
    return outside + of_layers + COPIES_AT_ONCE * largest


def _obstacle(needed: int, bounds: list[str]) -> str:
    return f"the model takes {byte_size(needed)} to run, over {MEMORY_SHARE:.0%} of what there is: {', '.join(bounds)}"
