"""What may be compressed: checkpoints opened as plain ones of a family that transformers knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from globe.checkpoint.quantized import dequantized, refuse_unread
from globe.checkpoint.reader import Checkpoint, open_checkpoint

_ALIASES: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""Model types of models that are another family's in all but name: Kimi-K2 is a DeepSeek-V3 of other sizes."""


def open_source(
    model: str | Path, revision: str | None = None, cache: Path | None = None, passing: Path | None = None
) -> Checkpoint:
    """Open a local folder or a Hub id, as `open_checkpoint` does, as what may be compressed: quantised weights appear
    dequantised, in the configuration's dtype, and an alias under the family's own name.

    Raises as `open_checkpoint` and `read_config` do, and `UnsupportedModelError` naming a quantisation that is not
    understood.
    """
    from globe.model.configuration import language_model  # transformers takes seconds to import

    checkpoint = open_known(model, revision, cache, passing)
    refuse_unread(checkpoint)
    return dequantized(checkpoint, language_model(checkpoint).dtype)


def open_known(
    model: str | Path, revision: str | None = None, cache: Path | None = None, passing: Path | None = None
) -> Checkpoint:
    """Open as `open_checkpoint` does; an alias appears under the family's own name."""
    checkpoint = open_checkpoint(model, revision, cache, passing)
    native = _ALIASES.get(str(checkpoint.config.get("model_type")))
    if native is None:
        return checkpoint
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    return dataclasses.replace(checkpoint, config=config | {"model_type": native})
