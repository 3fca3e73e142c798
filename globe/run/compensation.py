"""Whether the layers of a run make up for what those before them lost, and the model that tells it."""

from __future__ import annotations

import torch

from globe.errors import UnsupportedModelError
from globe.measure.compensate import Compensation
from globe.measure.runnable import find_place
from globe.model.streamed import StreamedModel
from globe.run.calibration import Calibration
from globe.run.job import Job


def begin_compensation(job: Job, calibration: Calibration) -> tuple[Compensation | None, str | None]:
    """Original and coded model before their first layer, or the reason why they are not run."""
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
        return Compensation(StreamedModel(job.checkpoint, place.device), windows), None
    except UnsupportedModelError as error:
        return None, str(error)
