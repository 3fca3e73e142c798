"""No model larger than its files: counts and sizes in config.json that nothing on disk stands for are refused early.

transformers builds what config.json says, a module at a time, before it looks at the files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from globe.checkpoint.header import TensorInfo
from globe.errors import CheckpointError
from globe.typed import shown

_LAYERS = re.compile(r"(?:.*_)?(?:n_layer|(?:num_)?layers|blocks|depth)")
_OTHERS = re.compile(r"(?:n|num)_(?:.+_)?(?:experts|labels)|.*expert_num")
_LEAST_TEXT, _LEAST_LAYERS, _LEAST_OTHERS = 64, 256, 4096  # quickly built; the files need not hold a vision tower


def check_counts(config: Mapping[str, Any], tensors: Collection[TensorInfo]) -> None:
    """Raise `CheckpointError` if the configuration counts more layers or experts than the tensors can be of."""
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    longest = max((size for tensor in tensors for size in tensor.shape), default=0)
    _check("num_hidden_layers", text.get("num_hidden_layers"), max(len(tensors), _LEAST_TEXT), len(tensors))
    for name, value in _numbers(config):
        if _LAYERS.fullmatch(name):
            _check(name, value, max(len(tensors), _LEAST_LAYERS), len(tensors))
        elif _OTHERS.fullmatch(name):
            _check(name, value, max(len(tensors), longest, _LEAST_OTHERS), len(tensors))


def _check(name: str, value: object, most: int, num_tensors: int) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and not value <= most:
        raise CheckpointError(
            f"config.json says {name} is {shown(value)}, and the files hold {num_tensors} tensors, which cannot be of "
            "so many: one of them belongs to another model; download the checkpoint again"
        )


def _numbers(part: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Every number of the configuration and its parts, by its own name."""
    for name, value in part.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield name, value
