"""Whether a model can be run here, beside being read, and where."""

from __future__ import annotations

import dataclasses
import math

from globe.checkpoint.quantized import DequantizedCheckpoint
from globe.checkpoint.reader import Checkpoint
from globe.machine.memory import total_memory
from globe.units import byte_size

MEMORY_SHARE = 0.5
"""Largest share of the memory, the machine's or the device's, that the weights of a model to be run may take."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model can be run."""

    device: str | None
    """None: nowhere here."""
    obstacle: str | None
    """Why not where that was asked for."""


def find_place(checkpoint: Checkpoint, device: str, itemsize: int | None = None) -> Place:
    """Where the model can be run with weights of `itemsize` bytes each (None: as they are stored).

    On the device if its memory allows, else on the CPU if that does.
    """
    if isinstance(checkpoint, DequantizedCheckpoint):
        return Place(None, "the source is quantised")
    tensors = checkpoint.tensors.values()
    needed = sum(tensor.nbytes if itemsize is None else itemsize * math.prod(tensor.shape) for tensor in tensors)
    bounds: list[str] = []
    for candidate in dict.fromkeys((device, "cpu")):
        memory, bound = total_memory(candidate)
        if needed <= MEMORY_SHARE * memory:
            return Place(candidate, _obstacle(needed, bounds) if bounds else None)
        bounds.append(bound)
    return Place(None, _obstacle(needed, bounds))


def _obstacle(needed: int, bounds: list[str]) -> str:
    return f"the model takes {byte_size(needed)} to run, over {MEMORY_SHARE:.0%} of what there is: {', '.join(bounds)}"
