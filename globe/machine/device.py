"""Where torch computes: the device that a setting stands for on this machine.

torch is imported where it is asked: settings name devices without it.
"""

from __future__ import annotations

import ctypes
import functools
import time
from pathlib import Path

from globe.errors import SettingsError
from globe.typed import shown

AUTO = "auto"
_DRIVER_NVIDIA, _DRIVER_AMD = "libcuda.so.1", Path("/dev/kfd")


def usable_device(device: str) -> str:
    """The device itself, or for `auto` the GPU where there is one that works (cuda), else the CPU.

    Raises `SettingsError` unless torch can compute on it here. Where no GPU can be torch is not imported for that,
    which takes seconds.
    """
    if device == "cpu" or (device == AUTO and not _has_driver()):
        return "cpu"
    import torch

    if device == AUTO:
        return "cuda" if torch.cuda.is_available() and _fault("cuda") is None else "cpu"
    fault = _fault(device)
    if fault is not None:
        raise SettingsError(
            f"device {device!r} cannot be used here ({fault}); choose cpu, cuda or mps, or auto for the GPU, if any"
        )
    return device


def _has_driver() -> bool:
    """Whether there is a driver that torch needs for its cuda devices."""
    try:
        ctypes.CDLL(_DRIVER_NVIDIA)
    except OSError:
        return _DRIVER_AMD.exists()
    return True


@functools.cache
def multiply_add_rate(device: str) -> float:
    """float32 multiply-adds a second in products of 1024 x 1024 matrices there, the best of five; takes a moment."""
    import torch

    a = torch.ones(1024, 1024, device=device)
    seconds: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return 1024**3 / min(seconds)


def check_device_word(device: str) -> None:
    """Raise `SettingsError` for what is no kind of device that GloBE runs on, wherever that is."""
    if device.partition(":")[0] not in (AUTO, "cpu", "cuda", "mps"):
        hint = "; a GPU of Nvidia or AMD is cuda, Apple's mps" if device.strip().lower() == "gpu" else ""
        raise SettingsError(f"device {shown(device)} is unknown; choose auto, cpu, cuda, cuda:1 or mps{hint}")


def _fault(device: str) -> str | None:
    """Why torch cannot compute there."""
    import torch

    try:
        place = torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        return str(error).splitlines()[0]
    return "it holds no numbers" if place.type == "meta" else None
