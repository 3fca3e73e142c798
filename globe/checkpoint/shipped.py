"""The trained mixture of experts that ships with the package: every command works without a download."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "pystdlib-moe"
"""A Qwen2-MoE of 5.2 million parameters, trained on the sources of the Python standard library; see its model card."""


def resolve_model(model: str | Path) -> str | Path:
    """`shipped` stands for the model that ships with the package; anything else is returned as it is."""
    return MODEL if str(model) == "shipped" else model
