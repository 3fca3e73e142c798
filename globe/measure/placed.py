"""What errors cost, measured on a model wherever it can be run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from globe.checkpoint.reader import Checkpoint
from globe.machine.ring import Ring
from globe.measure.runnable import Place
from globe.measure.sensitivity import Sensitivities, measure_sensitivities, random_windows
from globe.measure.streamed import KeptStates, calibrate_streamed, sensitivities_streamed
from globe.model.loading import load
from globe.model.streamed import StreamedModel


def every(windows: Tensor, most: int) -> int:
    """One in how many windows to take so that they are no more than `most`."""
    return math.ceil(len(windows) / most)


def placed_sensitivities(
    place: Place,
    checkpoint: Checkpoint,
    windows: Tensor | None,
    layers: Collection[int],
    most_windows: int,
    seed: int,
    folder: Path | None,
    ring: Ring,
) -> Sensitivities:
    """The sensitivities of the routed experts of `layers` on some of the token windows (N, length), or on random ones.

    Of a model that does not fit, each process of the ring finds those of the layers that it runs, and keeps hidden
    states in a file without a name in the folder (None: where such files lie). Raises as `load` and
    `measure_sensitivities` do.
    """
    assert place.device is not None
    if not place.is_streamed:
        model = load(checkpoint.fetched(), place.device, torch.float32)
        windows = random_windows(model, seed) if windows is None else windows
        return measure_sensitivities(model, windows[:: every(windows, most_windows)], layers, seed)
    model = StreamedModel(checkpoint, place.device)
    windows = random_windows(model.model, seed) if windows is None else windows
    windows = windows[:: every(windows, most_windows)]
    with contextlib.closing(KeptStates(folder)) as kept:
        list(calibrate_streamed(model, windows, (), kept, ring=ring))  # for what is kept alone
        return sensitivities_streamed(model, windows, layers, kept, seed, ring=ring)
