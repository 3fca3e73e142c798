"""The words of the settings: what each may be.

Nothing heavy is imported here, so that a command line is read at once.
"""

from __future__ import annotations

from typing import Literal, get_args

Family = Literal["gate", "up", "down"]
"""The matrices of an expert."""
FAMILIES: tuple[Family, ...] = get_args(Family)
Activation = Literal["identity", "silu", "tanh"]
"""φ between bank and adapter."""
CodeMap = Literal["ridge", "entmax15", "sparsemax", "softmax"]
"""Codes: signed (ridge) or on the simplex."""
WarmStartName = Literal["procrustes", "svd", "ts_pca", "left_gram_pca", "spherical_kmeans", "residual_greedy", "hybrid"]
"""Where a fit begins."""
Solver = Literal["varpro", "am"]
"""varpro: adapters eliminated, accelerated steps; am: closed-form alternating minimisation."""
Track = Literal["none", "wandb", "trackio", "tensorboard"]
"""Experiment tracker."""
