"""A model to be evaluated, as the memory allows: loaded as a whole, or run a layer at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globe.checkpoint.quantized import QUANT_METHOD, quant_method
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.checkpoint.source_layout import SOURCE_LAYOUT
from globe.errors import SettingsError, UnsupportedModelError
from globe.machine.device import usable_device
from globe.measure.runnable import find_place
from globe.measure.streamed_logits import StreamedLogits
from globe.model.dense_view import dense_view
from globe.model.loading import load
from globe.model.source import open_source
from globe.model.streamed import StreamedModel


@dataclasses.dataclass(frozen=True)
class PlacedModel:
    """A model, and how it is to be run."""

    model: str | Path
    """Folder or Hub id."""
    device: str
    streamed: Checkpoint | None = None
    """What is run a layer at a time, in float32; None where the model is loaded."""
    because: str = ""
    """Why it is not loaded."""

    def check_tasks(self) -> None:
        """Raise `SettingsError` unless tasks can be run on it."""
        if self.streamed is not None:
            raise SettingsError(
                f"tasks are run on a model that is loaded, and {self.model} would not be ({self.because}): leave "
                "--tasks out, or take a machine or --device with more memory"
            )

    @torch.no_grad()
    def run(self, windows: Tensor, batch: int, name: str) -> Any:
        """The model loaded, or its `StreamedLogits` on token windows (N, length); messages call it `name`."""
        if self.streamed is None:
            return load(self.model, self.device)
        model = StreamedModel(self.streamed, self.device)
        return StreamedLogits(model, windows, batch, name=name, because=self.because)


def place_model(model: str | Path, device: str) -> PlacedModel:
    """How a folder or Hub id can be run: as a whole on the device, else a layer at a time, there if it has the room.

    For that, experts that GloBE compressed are composed as they are read. What has room nowhere is loaded all the same,
    and so is what another method quantised that GloBE does not read. Raises as `open_checkpoint` and `dense_view` do.
    """
    device, checkpoint = usable_device(device), open_checkpoint(model)
    loaded = PlacedModel(model, device)
    is_native = quant_method(checkpoint) == QUANT_METHOD
    if is_native and not find_place(checkpoint, device, stays=True).is_streamed:
        return loaded
    if is_native or (checkpoint.folder / SOURCE_LAYOUT).exists():
        checkpoint = dense_view(checkpoint)
    else:
        try:
            checkpoint = open_source(model)
        except UnsupportedModelError:
            return loaded
    place = find_place(checkpoint, device, stays=True)
    if not place.is_streamed or place.device is None or place.obstacle is None:
        return loaded
    return PlacedModel(model, place.device, checkpoint, place.obstacle)
