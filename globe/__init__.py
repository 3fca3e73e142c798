"""GloBE: Mixture-of-Experts models compressed by experts that share banks of basis matrices.

Importing the package makes transformers load compressed checkpoints. It is cheap: what is named here is imported when
it is used, and the format is registered when transformers itself is.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from globe.registration import register_with_transformers

if TYPE_CHECKING:
    from globe.bank.factors import Factors
    from globe.checkpoint.evaluation import Evaluation
    from globe.checkpoint.push import push
    from globe.checkpoint.report import Report
    from globe.errors import CheckpointError, GlobeError, OutputError, SettingsError, UnsupportedModelError
    from globe.measure.evaluate import evaluate
    from globe.measure.settings import EvaluateConfig
    from globe.model.compose_cache import ComposeCache
    from globe.model.quantization_config import GlobeQuantizationConfig
    from globe.model.serving import set_compose_cache
    from globe.plan.recipe import Recipe, read_recipe
    from globe.plan.settings import CompressConfig
    from globe.report.page import write_report
    from globe.run.compress import compress
    from globe.run.export import export_dense
    from globe.run.imatrix import TypePlan, write_imatrix
    from globe.run.observer import Observer
    from globe.run.outlook import Outlook, inspect
    from globe.run.size import compress_within
    from globe.run.while_loading import GlobeConfig
    from globe.sweeps.settings import SweepConfig
    from globe.sweeps.sweep import SweepResult, sweep
    from globe.train.config import FitConfig
    from globe.train.fit_banks import fit_bank
    from globe.train.result import FitResult
    from globe.version import __version__

if sys.platform == "win32":
    raise ImportError("GloBE runs on Linux and macOS; on Windows use it inside WSL")

__all__ = [
    "CheckpointError",
    "ComposeCache",
    "CompressConfig",
    "EvaluateConfig",
    "Evaluation",
    "Factors",
    "FitConfig",
    "FitResult",
    "GlobeConfig",
    "GlobeError",
    "GlobeQuantizationConfig",
    "Observer",
    "Outlook",
    "OutputError",
    "Recipe",
    "Report",
    "SettingsError",
    "SweepConfig",
    "SweepResult",
    "TypePlan",
    "UnsupportedModelError",
    "__version__",
    "compress",
    "compress_within",
    "evaluate",
    "export_dense",
    "fit_bank",
    "inspect",
    "push",
    "read_recipe",
    "set_compose_cache",
    "sweep",
    "write_imatrix",
    "write_report",
]

_ROOMS = {
    "bank.factors": ("Factors",),
    "checkpoint.evaluation": ("Evaluation",),
    "checkpoint.push": ("push",),
    "checkpoint.report": ("Report",),
    "errors": ("CheckpointError", "GlobeError", "OutputError", "SettingsError", "UnsupportedModelError"),
    "measure.evaluate": ("evaluate",),
    "measure.settings": ("EvaluateConfig",),
    "model.compose_cache": ("ComposeCache",),
    "model.quantization_config": ("GlobeQuantizationConfig",),
    "model.serving": ("set_compose_cache",),
    "plan.recipe": ("Recipe", "read_recipe"),
    "plan.settings": ("CompressConfig",),
    "report.page": ("write_report",),
    "run.compress": ("compress",),
    "run.export": ("export_dense",),
    "run.imatrix": ("TypePlan", "write_imatrix"),
    "run.observer": ("Observer",),
    "run.outlook": ("Outlook", "inspect"),
    "run.size": ("compress_within",),
    "run.while_loading": ("GlobeConfig",),
    "sweeps.settings": ("SweepConfig",),
    "sweeps.sweep": ("SweepResult", "sweep"),
    "train.config": ("FitConfig",),
    "train.fit_banks": ("fit_bank",),
    "train.result": ("FitResult",),
    "version": ("__version__",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"globe.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


register_with_transformers()
