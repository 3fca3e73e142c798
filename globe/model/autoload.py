"""Loading without an explicit import: a file in the checkpoint, named in config.json, that imports globe.

transformers runs it with `trust_remote_code=True` only. GloBE itself never does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from globe.checkpoint.writer import write_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # whose import would register the format, and so come back here

AUTOLOAD = "globe_autoload.py"
AUTO_MAP: Mapping[str, str] = {"AutoConfig": "globe_autoload.GlobeAutoConfig"}
"""`auto_map` of a compressed model's config.json."""

_SOURCE = Path(__file__).parents[1] / "data" / AUTOLOAD


def write_autoload(folder: Path) -> str:
    """Put the file into a checkpoint whose config.json has the `AUTO_MAP`; returns its SHA-256."""
    return write_file(folder / AUTOLOAD, _SOURCE.read_bytes())


def save_with_autoload(model: PreTrainedModel) -> None:
    """Have `model.save_pretrained` tell its quantiser where it saves, and config.json mention the file."""
    model.config.auto_map = dict(AUTO_MAP)
    model.save_pretrained = functools.partial(_save_pretrained, model)  # as a method it would be pickled as the class's


def save_without_autoload(model: PreTrainedModel) -> None:
    """Undo `save_with_autoload`."""
    vars(model).pop("save_pretrained", None)
    vars(model.config).pop("auto_map", None)


def _save_pretrained(
    model: Any, save_directory: str | os.PathLike[Any], is_main_process: bool = True, *args: Any, **kwargs: Any
) -> None:
    writes = model.should_save_on_this_rank(is_main_process)
    model.hf_quantizer.save_directory = Path(save_directory) if writes else None
    type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
