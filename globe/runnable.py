"""Whether a model can be run on this machine, beside being read."""

from __future__ import annotations

import math
import os

from globe.checkpoint.quantized import DequantizedCheckpoint
from globe.checkpoint.reader import Checkpoint

MEMORY_SHARE = 0.5
"""Largest share of the machine's memory that the weights of a model to be run may take."""


def obstacle(checkpoint: Checkpoint, itemsize: int | None = None) -> str | None:
    """Why the model cannot be run with weights of `itemsize` bytes each (None: as they are stored), if so."""
    if isinstance(checkpoint, DequantizedCheckpoint):
        return "the source is quantised"
    tensors = checkpoint.tensors.values()
    needed = sum(tensor.nbytes if itemsize is None else itemsize * math.prod(tensor.shape) for tensor in tensors)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > MEMORY_SHARE * memory:
        return f"the model takes {needed / 1e9:.0f} GB to run and this machine has {memory / 1e9:.0f} GB"
    return None
