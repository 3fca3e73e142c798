"""What `calibrate` and `measure_sensitivities` find, of a model that does not fit into memory.

Forward, every layer is read once and run on all windows; what it was called with is kept on the disk. Backward, the
layers are read once more from the last to the first, each is run again on what was kept, a window at a time, and hands
the gradient of its output on to its input. Memory holds a layer, the hidden states of all windows, and what is found.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from globe.checkpoint.writer import tensor_bytes
from globe.experts.metric import LayerStatistics
from globe.machine.memory import explained_exhaustion
from globe.measure.calibrate import LayerSums
from globe.measure.sensitivity import Sensitivities, adding_squares, by_token, sampled_loss
from globe.measure.tokenizers import check_vocabulary
from globe.model.expert_run import run_by
from globe.model.loading import OUT_OF_MEMORY
from globe.model.streamed import StreamedModel


class KeptStates:
    """Hidden states (N, length, …) of some windows before each layer and behind the last, in a file without a name."""

    def __init__(self, folder: Path | None, every: int = 1) -> None:
        """Of one in so many windows, from the first on. Folder None: where files without a name usually lie."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._every, self._places = every, dict[int, tuple[int, torch.Size]]()

    def close(self) -> None:
        """Forget them."""
        self._file.close()

    def windows(self, windows: Tensor) -> Tensor:
        """Those of all that are kept."""
        return windows[:: self._every]

    def write(self, layer: int, hidden: list[Tensor]) -> None:
        states = torch.cat(hidden)[:: self._every].float()
        self._places[layer] = self._file.seek(0, 2), states.shape
        self._file.write(tensor_bytes(states))

    def read(self, layer: int) -> Tensor:
        place, shape = self._places[layer]
        content = bytearray(4 * math.prod(shape))
        self._file.seek(place)
        self._file.readinto(content)
        return torch.frombuffer(content, dtype=torch.float32).view(shape)


@torch.no_grad()
def calibrate_streamed(
    model: StreamedModel,
    windows: Tensor,
    layers: Collection[int],
    kept: KeptStates | None = None,
    batch: int = 8,
    *,
    inner: bool = False,
) -> Iterator[tuple[int, LayerStatistics]]:
    """The statistics of `layers` on token windows (N, length), each as soon as its layer has been run.

    What a backward pass needs is written to `kept`. Raises as `calibrate` does.
    """
    check_vocabulary(windows, model.model, "the model")
    with explained_exhaustion(f"calibrating on {model.device}", OUT_OF_MEMORY):
        passage = model.enter(windows, batch)
        for index in range(len(model) if kept is not None else max(layers) + 1):
            if kept is not None:
                kept.write(index, passage.hidden)
            with model.layer(index) as layer:
                if index not in layers:
                    passage.through(index, layer)
                    continue
                sums = LayerSums(model.experts[index], inner=inner)
                with run_by(model.experts[index], sums.run):
                    passage.through(index, layer)
            yield index, sums.statistics()
        if kept is not None:
            kept.write(len(model), passage.hidden)


def sensitivities_streamed(
    model: StreamedModel, windows: Tensor, layers: Collection[int], kept: KeptStates, seed: int = 0, batch: int = 8
) -> Sensitivities:
    """The sensitivities of the routed experts of `layers` on those of the windows whose states were kept.

    Raises as `measure_sensitivities` does.
    """
    sums: Sensitivities = {}
    windows, generator = kept.windows(windows), torch.Generator().manual_seed(seed)
    with explained_exhaustion(f"measuring sensitivities on {model.device}", OUT_OF_MEMORY):
        with torch.no_grad():
            others = model.enter(windows, batch).others
        gradients = kept.read(len(model))
        for window, states in zip(windows, gradients, strict=True):
            hidden = states[None].to(model.device).requires_grad_()
            with torch.enable_grad():
                sampled_loss(model.leave(window[None], hidden), generator).backward()
            assert hidden.grad is not None
            states.copy_(hidden.grad[0])
        for index in range(len(model) - 1, min(layers) - 1, -1):
            inputs = kept.read(index)
            with contextlib.ExitStack() as stack:
                layer = stack.enter_context(model.layer(index))
                if index in layers:
                    stack.enter_context(adding_squares(model.experts[index], sums, windows.shape[1]))
                for states, gradient, calls in zip(inputs.split(batch), gradients.split(batch), others, strict=True):
                    hidden = states.to(model.device).requires_grad_(index > min(layers))
                    arguments, keywords = calls[index]
                    with torch.enable_grad():
                        layer(hidden, *arguments, **keywords).backward(gradient.to(model.device))
                    if hidden.grad is not None:
                        gradient.copy_(hidden.grad)
    return by_token(sums, windows)
