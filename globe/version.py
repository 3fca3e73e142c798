"""The version of GloBE, and of what it runs on."""

from __future__ import annotations

import importlib.metadata
import platform

__version__ = importlib.metadata.version("globe-moe")


def versions() -> dict[str, str]:
    """Of the packages that a result may depend on, by name."""
    packages = ("torch", "transformers", "safetensors")
    installed = {package: importlib.metadata.version(package) for package in packages}
    return {"globe": __version__, "python": platform.python_version(), **installed}
