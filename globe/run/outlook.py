"""What a compression will read, write and need, as far as headers, settings and the machine tell before it runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from globe.checkpoint.header import item_bytes
from globe.checkpoint.layout import ExpertLayer
from globe.machine.memory import total_memory
from globe.measure.runnable import Place, bytes_at_once, find_place, has_room
from globe.measure.runs import is_compensated, wants_sensitivities, windows_seen
from globe.plan.budget import Bits
from globe.plan.settings import CompressConfig
from globe.quant.sizes import MOST_WEIGHTS
from globe.run.observer import clock
from globe.run.outline import PLANNING_PASSES, Outline, outline
from globe.run.ranks import ALONE, Ranks
from globe.units import byte_size

if TYPE_CHECKING:
    from globe.run.pace import Foreseen

_PROCESS = 1_300_000_000
"""Bytes of a process that has compressed next to nothing: libraries, compiled kernels, activations; see docs/log.md."""
_COPIES_CODED, _COPIES_FITTED = 6, 8
"""Of the experts that are worked on, in float32, at the peak of coding them, whole or a part (measured: 4.9, 5.3), or
of fitting them."""


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What a compression will read, write and need."""

    source: str
    read: int
    """Bytes of the source's tensors."""
    absent: int
    """Of these, bytes that have to be downloaded."""
    passes: int
    """How many times they are downloaded; 0: once, to stay."""
    here: int
    """Bytes that the disk holds of them at most."""
    written: int
    """Bytes of the output's tensors."""
    waiting: int
    """Bytes that the disk holds beside them for a while: of a layer that is too large to wait in memory."""
    free: int
    """Bytes that are free where the output is to be."""
    memory: int
    """Bytes at the peak, about, of all processes here."""
    available: int
    """Bytes of memory there are."""
    bound: str
    """Whose bound that is."""
    foresee: Callable[[], Foreseen] = dataclasses.field(repr=False, compare=False)
    """Finds `foreseen`, which takes seconds, and where coding was never done before half a minute to compile it."""
    is_coded: bool
    device: str
    """With the number of processes, where they are several."""
    unmeasured_because: str | None
    """Why the model will not be run to be measured, although that is asked for."""
    streamed_because: str | None
    """Why it will be run a layer at a time."""

    @functools.cached_property
    def foreseen(self) -> Foreseen:
        """How long it will take, if no fit ends before its last step."""
        return self.foresee()

    @property
    def seconds(self) -> float:
        """How long it will take, all together."""
        return self.foreseen.measuring + self.foreseen.working

    def __str__(self) -> str:
        return "\n".join((*self.lines(), self.takes()))

    def lines(self) -> Iterator[str]:
        """The three lines that say it, but for the time, and one for each thing that will not go as asked."""
        absent = f", {byte_size(self.absent)} of it downloaded" if self.absent else ""
        if self.absent and self.passes:
            absent += f" {self.passes} times, {byte_size(self.here)} here at a time"
        yield f"reads       {byte_size(self.read)} of {self.source}{absent}"
        waiting = f", and {byte_size(self.waiting)} for a while" if self.waiting else ""
        written = f"{byte_size(self.written)} ({self.written / self.read:.1%}){waiting}"
        yield f"writes      {written}; {byte_size(self.free)} are free"
        yield f"needs       about {byte_size(self.memory)} of memory; {self.bound}"
        if self.written + self.waiting + self.here > self.free:
            yield "note: the disk is too small for that: make room, or choose another folder"
        if self.unmeasured_because is not None:
            yield (
                f"note: {self.unmeasured_because}: errors will be weighed by the weights alone, at a higher loss, "
                "unless the machine has more memory"
            )
        if self.streamed_because is not None:
            yield (
                f"note: {self.streamed_because}: it is run a layer at a time, and not on samples of its own; give text "
                "like your use with --calibrate"
            )
        if self.memory > self.available:
            less = "--calibrate none, at a higher loss" if self.is_coded else "--scope layer or --stream"
            yield f"note: the memory is too small for that: choose {less}, or another machine"

    def takes(self) -> str:
        """The line that says how long it will take, which itself takes seconds to find."""
        return f"takes       about {clock(self.seconds)} on this {self.device}{self._parts()}"

    def _parts(self) -> str:
        measuring, working = (clock(seconds) for seconds in (self.foreseen.measuring, self.foreseen.working))
        what = "code" if self.is_coded else "fit"
        return f" ({measuring} to measure the model, {working} to {what} it)" if self.foreseen.measuring else ""


def inspect(
    model: str | Path,
    config: CompressConfig = CompressConfig(),  # noqa: B008
    revision: str | None = None,
    cache: Path | None = None,
    *,
    low_disk: bool = False,
) -> Outlook:
    """What a compression of `model` (a folder or a Hub id) would read, write and need, from headers alone.

    Raises as `compress` does.
    """
    return look_ahead(outline(model, config, revision, cache, Path() if low_disk else None))


def look_ahead(outline: Outline, output: Path | None = None, ranks: Ranks = ALONE) -> Outlook:
    """What a compression into `output` (None: the working directory) will take."""
    checkpoint, config = outline.checkpoint, outline.config
    folder = (output or Path()).absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    stored = checkpoint.files.tensors.values()
    here = {shard for shard in checkpoint.shards if (checkpoint.folder / shard).exists()}
    absent = 0
    if checkpoint.repo is not None:
        absent = sum(tensor.nbytes for tensor in stored if tensor.shard not in here)
    at_a_time = min(absent, checkpoint.coming.most_bytes) if checkpoint.coming and checkpoint.is_passing else absent
    measured = config.calibrate != "none" or config.allocation != "uniform"
    place = find_place(checkpoint, config.device, item_bytes("F32"))
    runs, statistics = measured and place.device is not None, _statistics(outline)
    if place.is_streamed:
        needed = bytes_at_once(checkpoint) + max(statistics) + _states(outline, place)
    else:
        needed = 4 * sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()) + sum(statistics)
        needed = max(needed, bytes_at_once(checkpoint) + _states(outline, place))
    is_shared = has_room(checkpoint, place, ranks.num_here)
    needed *= ranks.num_here if is_shared else 1
    working = ranks.num_here * (max(statistics) * runs + _worked_on(outline))
    if runs and is_compensated(config):
        working += _states(outline, place)
    available, bound = total_memory("cpu")
    return Outlook(
        outline.source,
        sum(tensor.nbytes for tensor in stored),
        absent,
        _passes(config, runs=runs) if checkpoint.is_passing else 0,
        at_a_time,
        outline.predicted_bytes(outline.scopes),
        outline.waiting_bytes() if runs else 0,
        free,
        ranks.num_here * _PROCESS + max(needed * runs, working),
        available,
        bound,
        functools.partial(_foresee, outline, place if measured else Place(None, None), ranks.size, is_shared),
        config.is_coded,
        config.device if ranks.size == 1 else f"{config.device} in {ranks.size} processes",
        place.obstacle if measured and place.device is None else None,
        place.obstacle if measured and place.is_streamed else None,
    )


def _foresee(outline: Outline, place: Place, processes: int, is_shared: bool) -> Foreseen:
    from globe.run.pace import foresee  # what runs models takes seconds to import

    return foresee(outline, place, processes, is_shared)


def _passes(config: CompressConfig, *, runs: bool) -> int:
    """How often a coded compression goes through the source: forward and backward to measure it, to plan, to code, and
    for what stays as it is. A plan with banks goes through it once more, which nobody knows beforehand."""
    measuring = runs * (1 + wants_sensitivities(config)) if config.statistics is None else 0
    return measuring + (1 if config.is_packed else PLANNING_PASSES) + 2


def _states(outline: Outline, place: Place) -> int:
    """Bytes of the hidden states of all windows where the model is run a layer at a time: those that went in and came
    out, or, where layers make up for each other, of two models, what one layer would give, its experts' inputs, and
    the difference."""
    windows, length = windows_seen(outline.config, place)
    width = next(iter(outline.layers.values())).hidden_size
    return 4 * windows * length * width * (5 if is_compensated(outline.config) else 2)


def _worked_on(outline: Outline) -> int:
    """Bytes of the experts that a process works on at once: all of a scope that are fitted together; or a part of a
    family that is coded beside what is to be added to it, or the families of a layer that are coded before it, unless
    they wait on disk; and what is coded of the layer."""
    config, sizes = outline.config, outline.layers
    if not isinstance(config.budget, Bits):
        at_once = [scope.layers[:1] if config.stream else scope.layers for scope in outline.scopes]
        most = max(sum(_weights(sizes[index]) for index in layers) for layers in at_once)
        return 4 * _COPIES_FITTED * most * len(config.families)
    weights, itemsize = max((_weights(each), item_bytes(each.dtype)) for each in sizes.values())
    num_parts = 1 if config.is_packed else math.ceil(weights / MOST_WEIGHTS)
    part = 4 * _COPIES_CODED * math.ceil(weights / num_parts)
    stack = itemsize * weights * (is_compensated(config) and weights <= MOST_WEIGHTS)
    coded = len(config.families) * config.budget.num_bytes(weights)
    return max(part + stack, len(config.families) * stack) + coded


def _weights(layer: ExpertLayer) -> int:
    """Of a family."""
    return layer.num_experts * layer.intermediate_size * layer.hidden_size


def _statistics(outline: Outline) -> list[int]:
    """Bytes of what is known of each layer when the model was run."""
    found: list[int] = []
    for index in {index for scope in outline.scopes for index in scope.layers}:
        layer = outline.layers[index]
        E, P, D = layer.num_experts, layer.intermediate_size, layer.hidden_size
        found.append(4 * (D * D + 3 * E * P + (E * P * P if outline.config.is_coded else 0)))
    return found
