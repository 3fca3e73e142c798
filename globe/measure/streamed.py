"""What `calibrate` and `measure_sensitivities` find, of a model that does not fit into memory.

Forward, every layer is read once and run on all windows; what it was called with is kept on the disk. Backward, the
layers are read once more from the last to the first, each is run again on what was kept, a batch of windows at a time,
and hands the gradient of its output on to its input. Memory holds a layer without its experts, one of these at a time,
the hidden states of all windows, and what is found.

Several processes form a ring, in which layers are dealt out in turn, and a batch of windows goes on to the next as soon
as it has gone through a layer: each layer is run in one process, on the same batches in the same order as by one alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from globe.checkpoint.tensor_files import tensor_bytes
from globe.experts.metric import LayerStatistics
from globe.machine.memory import explained_exhaustion
from globe.machine.ring import Ring
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
        states = torch.stack([*itertools.islice(itertools.chain.from_iterable(hidden), 0, None, self._every)]).float()
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
    ring: Ring | None = None,
) -> Iterator[tuple[int, LayerStatistics]]:
    """The statistics of `layers` on token windows (N, length), each as soon as its layer has been run.

    Of several processes, each gives those of the layers that it runs. What a backward pass needs is written to `kept`.
    Raises as `calibrate` does.
    """
    check_vocabulary(windows, model.model, "the model")
    ring = ring or Ring()
    with explained_exhaustion(f"calibrating on {model.device}", OUT_OF_MEMORY):
        passage = model.enter(windows, batch)
        last = max(layers) + 1 if kept is None else len(model)
        for index in ring.turns(last):
            with contextlib.ExitStack() as stack:
                layer, sums = stack.enter_context(model.layer(index)), None
                if index in layers:
                    sums = LayerSums(model.experts[index], inner=inner)
                    stack.enter_context(run_by(model.experts[index], sums.run))
                for place, entered in enumerate(passage.hidden):
                    if index > 0:
                        passage.hidden[place] = ring.take(entered)
                    output = passage.output(index, layer, place)
                    if kept is not None or index + 1 < last:
                        ring.give(output)
            if kept is not None:
                kept.write(index, passage.hidden)
            if sums is not None:
                yield index, sums.statistics()
        if kept is not None and len(model) in ring.turns(len(model) + 1):
            kept.write(len(model), [ring.take(states) for states in passage.hidden])


def sensitivities_streamed(
    model: StreamedModel,
    windows: Tensor,
    layers: Collection[int],
    kept: KeptStates,
    seed: int = 0,
    batch: int = 8,
    ring: Ring | None = None,
) -> Sensitivities:
    """The sensitivities of the routed experts of `layers` on those of the windows whose states were kept.

    Of several processes, each gives those of the layers that it runs, the ones before which it has kept the states.
    Raises as `measure_sensitivities` does.
    """
    sums: Sensitivities = {}
    ring, first = ring or Ring(), min(layers)
    windows, generator = kept.windows(windows), torch.Generator().manual_seed(seed)
    with explained_exhaustion(f"measuring sensitivities on {model.device}", OUT_OF_MEMORY):
        with torch.no_grad():
            others = model.enter(windows, batch).others
        for index in reversed(ring.turns(len(model) + 1)):
            if index == len(model):
                for some, states in zip(windows.split(batch), kept.read(index).split(batch), strict=True):
                    ring.give(_gradient(model, some, states, generator), back=True)
            elif index >= first:
                with contextlib.ExitStack() as stack:
                    layer = stack.enter_context(model.layer(index))
                    if index in layers:
                        stack.enter_context(adding_squares(model.experts[index], sums, windows.shape[1]))
                    for states, calls in zip(kept.read(index).split(batch), others, strict=True):
                        hidden = states.to(model.device).requires_grad_(index > first)
                        arguments, keywords = calls[index]
                        with torch.enable_grad():
                            output = layer(hidden, *arguments, **keywords)
                            output.backward(ring.take(output.detach(), back=True))
                        if hidden.grad is not None:
                            ring.give(hidden.grad, back=True)
    return by_token(sums, windows)


def _gradient(model: StreamedModel, windows: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
    """Of the loss, for what the last layer gives, one window after the other."""
    found = list[Tensor]()
    for window, each in zip(windows, states, strict=True):
        hidden = each[None].to(model.device).requires_grad_()
        with torch.enable_grad():
            sampled_loss(model.leave(window[None], hidden), generator).backward()
        assert hidden.grad is not None
        found.append(hidden.grad)
    return torch.cat(found)
