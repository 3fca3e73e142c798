"""Layers coded in order, each making up for what those before it lost, or the reason why they are not."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.errors import UnsupportedModelError
from globe.experts.on_disk import Stack
from globe.measure.compensate import Compensation
from globe.measure.runnable import find_place
from globe.model.streamed import StreamedModel
from globe.run.calibration import Calibration
from globe.run.coding import CodedFamily, code_family
from globe.run.job import Job
from globe.run.prepare import Preparation
from globe.run.ranks import Ranks
from globe.terms import Family


class LayersInOrder:
    """Codes layers one after the other. All but down does not depend on earlier layers: that of as many layers as there
    are processes is coded by these at once."""

    def __init__(
        self, job: Job, preparation: Preparation, compensation: Compensation, layers: Sequence[int], ranks: Ranks
    ) -> None:
        """`layers` are those to be coded."""
        self.compensation = compensation
        self._layers, self._ranks, self._families = layers, ranks, job.config.families
        self._sizes = job.layers
        calibration = preparation.calibration
        known = job, preparation.coding, calibration.statistics, calibration.sensitivities
        self._code = functools.partial(code_family, *known)
        self._ahead = dict[int, list[CodedFamily]]()

    def code(self, index: int) -> list[CodedFamily]:
        """The families of the next layer."""
        if index not in self._ahead:
            self._code_ahead(self._layers.index(index))
        began, found = time.monotonic(), self._ahead.pop(index)
        found.append(self._code(index, "down", self.compensation.correction(index, self._decoded(index, found))))
        self.compensation.go_through(index, self._decoded(index, found))
        report = dataclasses.replace(found[-1].report, seconds=time.monotonic() - began)
        return [*found[:-1], dataclasses.replace(found[-1], report=report)]

    def _decoded(self, index: int, coded: Sequence[CodedFamily]) -> dict[Family, Stack]:
        dtype, scratch = TORCH_DTYPES[self._sizes[index].dtype], self.compensation.scratch
        return {each.spec.family: each.matrices(dtype, scratch) for each in coded}

    def _code_ahead(self, place: int) -> None:
        layers = self._layers[place : place + self._ranks.size]
        keys = [(layer, family) for layer in layers for family in self._families if family != "down"]
        coded = self._ranks.map(self._code, *zip(*keys, strict=True)) if keys else []
        self._ahead = {layer: [each for each in coded if each.spec.layer == layer] for layer in layers}


def begin_compensation(job: Job, calibration: Calibration, scratch: Path) -> tuple[Compensation | None, str | None]:
    """Original and coded model before their first layer, or the reason why they are not run; what is large of a layer
    waits in the folder `scratch`."""
    if "down" not in job.config.families:
        return None, "down is not coded"
    text = job.calibration_text
    windows = calibration.windows if text is None else text.windows
    if calibration.statistics is None or windows is None:
        return None, f"the model was not run: {calibration.uncalibrated_because}"
    place = find_place(job.checkpoint, job.config.device, torch.float32.itemsize)
    if place.device is None:
        return None, place.obstacle
    try:
        return Compensation(StreamedModel(job.checkpoint, place.device), windows, scratch=scratch), None
    except UnsupportedModelError as error:
        return None, str(error)
