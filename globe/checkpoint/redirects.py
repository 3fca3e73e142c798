"""Entries of config.json that would have transformers load something else than the files that GloBE reads.

They name other files, code on the Hub, or another repository. A model that carries one is refused before anything of it
is loaded: what would be run is not what is compressed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from globe.checkpoint.side_files import CONFIG
from globe.errors import CheckpointError

_OTHER_FILES = {
    "transformers_weights": "other weights",
    "configuration_files": "another configuration",
}
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_ARCHITECTURES = ("backbone", "architecture")
"""Of timm's models, which it fetches where they have a scheme."""


def refuse_redirects(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` naming the entry of a folder's config.json that redirects what is loaded or run.

    Weights of a distributed training, which come before any others, do the same. `auto_map`, which names code beside
    the model, is left alone: GloBE never runs it. So are attention implementations that are installed; those with a
    slash are kernels from the Hub.
    """
    for path, key, value in _entries(config, ""):
        asks_for = _redirection(key, value)
        if asks_for is not None:
            raise CheckpointError(
                f"{folder / CONFIG}: {path} is {value!r}, which asks for {asks_for} that GloBE does not read; take the "
                "entry out if the model is whole without it"
            )
    if shard := next((path.name for path in folder.iterdir() if _DISTRIBUTED.fullmatch(path.name)), None):
        raise CheckpointError(
            f"{folder} holds the weights of a distributed training, such as {shard}, which transformers loads and "
            "GloBE does not: load it in transformers and save_pretrained, or remove them if the other weights are whole"
        )


def _redirection(key: str, value: Any) -> str | None:
    if value is None:
        return None
    if key in _OTHER_FILES:
        return _OTHER_FILES[key]
    if key.removeprefix("_").removesuffix("_internal") in _IMPLEMENTATIONS:
        named = value.values() if isinstance(value, Mapping) else [value]
        return "code from the Hub" if any("/" in name for name in _strings(named)) else None
    if key in _ARCHITECTURES and isinstance(value, str) and ":" in value:
        return "a model from elsewhere"
    return None


def _strings(values: Any) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _strings(value.values())


def _entries(config: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of every entry, of nested ones too."""
    waiting = [(prefix, config)]
    while waiting:
        prefix, section = waiting.pop()
        for key, value in section.items() if isinstance(section, Mapping) else enumerate(section):
            if isinstance(section, Mapping):
                yield f"{prefix}{key}", str(key), value
            if isinstance(value, Mapping | list):
                waiting.append((f"{prefix}{key}.", value))
