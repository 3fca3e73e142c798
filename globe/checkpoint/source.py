"""What may be compressed: a checkpoint as transformers and GloBE understand it, in floating point."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from globe.checkpoint.quantized import dequantized
from globe.checkpoint.reader import Checkpoint, open_checkpoint

_ALIASES: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""Model types of models that are another family's in all but name: Kimi-K2 is a DeepSeek-V3 of other sizes."""


def open_source(model: str | Path) -> Checkpoint:
    """Open a local folder or a Hub id; quantised weights appear dequantised, an alias under the family's own name.

    Raises as `open_checkpoint` does, and `UnsupportedModelError` naming a quantisation that is not understood.
    """
    checkpoint = dequantized(open_checkpoint(model))
    native = _ALIASES.get(checkpoint.config.get("model_type") or "")
    if native is None:
        return checkpoint
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    return dataclasses.replace(checkpoint, config=config | {"model_type": native})
