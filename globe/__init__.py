"""GloBE: Mixture-of-Experts models compressed by experts that share banks of basis matrices.

Importing the package makes transformers load compressed checkpoints.
"""

from __future__ import annotations

import globe.model  # noqa: F401  (registers the quantisation method "globe")
from globe.bank.factors import Factors
from globe.compress import compress
from globe.config import CompressConfig
from globe.errors import CheckpointError, GlobeError, OutputError, SettingsError, UnsupportedModelError
from globe.evaluate import EvaluateConfig, Evaluation, evaluate
from globe.export import export_dense
from globe.model import ComposeCache, set_compose_cache
from globe.report import Report
from globe.sweep import SweepConfig, SweepResult, sweep
from globe.train.config import FitConfig
from globe.train.fit_banks import fit_bank
from globe.train.result import FitResult
from globe.version import __version__

__all__ = [
    "CheckpointError",
    "ComposeCache",
    "CompressConfig",
    "EvaluateConfig",
    "Evaluation",
    "Factors",
    "FitConfig",
    "FitResult",
    "GlobeError",
    "OutputError",
    "Report",
    "SettingsError",
    "SweepConfig",
    "SweepResult",
    "UnsupportedModelError",
    "__version__",
    "compress",
    "evaluate",
    "export_dense",
    "fit_bank",
    "set_compose_cache",
    "sweep",
]
