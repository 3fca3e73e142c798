"""The trained mixture of experts and the texts that ship with the package: every command works without a download."""

from __future__ import annotations

import gzip
from pathlib import Path

from globe.errors import SettingsError

DATA = Path(__file__).parent / "data"
MODEL = DATA / "pystdlib-moe"
"""A Qwen2-MoE of 5.2 million parameters, trained on the sources of the Python standard library; see its model card."""
SPLITS = ("calibration", "heldout")


def read_text(source: str | Path) -> str:
    """A shipped split (`calibration` or `heldout`) or the UTF-8 text file at a path.

    Raises `SettingsError` when it is neither.
    """
    if str(source) in SPLITS:
        return gzip.decompress((DATA / f"{source}.txt.gz").read_bytes()).decode()
    path = Path(source)
    if not path.is_file():
        raise SettingsError(
            f"text {str(source)!r} is neither a file nor one of the shipped splits {', '.join(SPLITS)}; "
            "save a data set's text to a file first"
        )
    return path.read_text(encoding="utf-8", errors="replace")


def resolve_model(model: str | Path) -> str | Path:
    """`shipped` stands for the model that ships with the package; anything else is returned as it is."""
    return MODEL if str(model) == "shipped" else model
