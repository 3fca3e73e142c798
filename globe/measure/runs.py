"""For what, and on how much text, a compression runs the model."""

from __future__ import annotations

from globe.measure.runnable import Place
from globe.measure.settings import EvaluateConfig
from globe.plan.settings import CompressConfig

NUM_SAMPLES, LENGTH = 64, 128
"""Windows that the model itself writes, and tokens in each; measured, see docs/log.md."""
NUM_WINDOWS, WINDOW = 8, 256
"""Random ones, and tokens in each, or as many as the model can take."""
MOST_WINDOWS = 64
"""On which sensitivities are measured: single experts want more tokens than whole banks; measured, see docs/log.md."""


def wants_sensitivities(config: CompressConfig) -> bool:
    """Whether it is measured what errors cost, and not every expert is to count the same."""
    return config.is_coded and config.allocation == "sensitivity"


def is_sampled(config: CompressConfig, place: Place) -> bool:
    """Whether the model is run on text of its own."""
    return config.calibrate == "samples" and not place.is_streamed


def is_compensated(config: CompressConfig) -> bool:
    """Whether layers are to make up for the errors of those before them."""
    is_run = config.calibrate != "none"
    return is_run and config.is_coded and not config.is_packed and "down" in config.families


def windows_seen(config: CompressConfig, place: Place) -> tuple[int, int]:
    """How many token windows the model is run on at most, and their length."""
    if config.calibrate == "none":
        return NUM_WINDOWS, WINDOW
    if is_sampled(config, place):
        return NUM_SAMPLES, LENGTH
    most = config.calibration_tokens
    if config.calibrate == "samples":  # which a text stands for
        most = min(most, NUM_SAMPLES * EvaluateConfig.length)
    return max(1, most // EvaluateConfig.length), EvaluateConfig.length
