"""Configurations as transformers reads them: every one that GloBE looks at comes from here.

What transformers raises on the way, of whatever kind, becomes a `GlobeError` that says what to do. No code of a
checkpoint runs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from globe.checkpoint.dtypes import DTYPE_NAMES
from globe.checkpoint.header import FLOAT_DTYPES
from globe.checkpoint.layout import ExpertLayer, LanguageModel, find_expert_layers
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.side_files import CONFIG
from globe.errors import CheckpointError, GlobeError, UnsupportedModelError
from globe.machine.memory import is_exhaustion

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "encoder_layers", "decoder_layers")
"""Numbers of layers, each of which holds a tensor at least."""
_ROUTED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Numbers of experts that a token is routed to."""
_RAISED = (
    OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError, AssertionError,
    ImportError, StrictDataclassError, SafetensorError,
)  # fmt: skip
"""What transformers has been seen to raise on configurations and files that do not fit it."""
_FLOAT = "__float__"
"""transformers' key for a number that JSON cannot carry: {"__float__": "Infinity"}."""


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The configuration as transformers reads it.

    Raises `UnsupportedModelError` if transformers does not know the model without remote code, `CheckpointError` if it
    does not accept an entry.
    """
    folder, model_type = checkpoint.folder, checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot build {folder} without remote code: it does not know the "
            f"model_type {model_type!r} of its {CONFIG}; a newer release may (pip install --upgrade transformers)"
        )
    _check_sizes(checkpoint)
    with explained(f"transformers does not accept the {CONFIG} of {folder}", f"correct that entry of {CONFIG}"):
        return CONFIG_MAPPING[model_type].from_dict(json.loads(json.dumps(checkpoint.config), object_hook=_read_entry))


def _read_entry(entry: dict[str, Any]) -> Any:
    """An object of config.json: a number that JSON cannot carry, or entries."""
    if entry.keys() == {_FLOAT}:
        return float(entry[_FLOAT])
    return entry


def in_json(config: Any) -> Any:
    """A configuration, or a part of one, whose infinities and NaNs are written as transformers does and reads them."""
    if isinstance(config, dict):
        return {key: in_json(value) for key, value in config.items()}
    if isinstance(config, list):
        return [in_json(value) for value in config]
    if isinstance(config, float) and (config != config or config in (float("inf"), float("-inf"))):
        return {_FLOAT: json.dumps(config)}
    return config


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for more layers or labels than the files can hold: listing them could take for ever."""
    widest = max((max(tensor.shape, default=1) for tensor in checkpoint.tensors.values()), default=0)
    for part in _parts(checkpoint.config):
        for key, most in (*((depth, len(checkpoint.tensors)) for depth in _DEPTHS), ("num_labels", max(2, widest))):
            if isinstance(part.get(key), int) and part[key] > most:
                raise CheckpointError(
                    f"{CONFIG} of {checkpoint.folder} says {key} {part[key]}, which is more than the "
                    f"{len(checkpoint.tensors)} tensors of its files can be of: correct {CONFIG} or download it again"
                )


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's part of a configuration: all of it, unless the model has other parts too."""
    with explained(f"transformers finds no one language model in the {CONFIG}", "GloBE compresses language models"):
        found = config.get_text_config()
    return found if isinstance(found, PreTrainedConfig) else config


def expert_layers(checkpoint: Checkpoint) -> list[ExpertLayer]:
    """The layers that have routed experts, by number.

    Raises as `read_config` and `find_expert_layers` do, and `CheckpointError` if config.json routes each token to more
    experts than there are.
    """
    layers = find_expert_layers(checkpoint, language_model(checkpoint))
    check_routing(checkpoint, layers)
    return layers


def language_model(checkpoint: Checkpoint) -> LanguageModel:
    """What the arrangement of a checkpoint's files depends on. Raises as `read_config` does."""
    config = read_config(checkpoint)
    text = text_config(config)
    stated = (getattr(part, "dtype", None) for part in (text, config))
    names = (DTYPE_NAMES.get(dtype) for dtype in stated if isinstance(dtype, torch.dtype))
    return LanguageModel(
        text.model_type,
        getattr(text, "num_hidden_layers", None),
        getattr(text, "zero_expert_num", None) or 0,
        next((name for name in names if name in FLOAT_DTYPES), LanguageModel.dtype),
    )


def check_routing(checkpoint: Checkpoint, layers: Iterable[ExpertLayer]) -> None:
    """Raise `CheckpointError` if config.json routes each token to more experts than one of the layers has."""
    text = text_config(read_config(checkpoint))
    least = min(layer.num_experts for layer in layers) + (getattr(text, "zero_expert_num", None) or 0)
    for key, count in _routed(text).items():
        if count > least:
            raise CheckpointError(
                f"{CONFIG} of {checkpoint.folder} routes each token to {count} experts ({key}), and a layer has "
                f"{least}: correct {CONFIG}"
            )


def experts_per_token(checkpoint: Checkpoint) -> int | None:
    """To how many routed experts a token goes; None where config.json does not tell. Raises as `read_config` does."""
    return max(_routed(text_config(read_config(checkpoint))).values(), default=None)


def _routed(text: PreTrainedConfig) -> dict[str, int]:
    """What a configuration says of it, by key."""
    return {key: count for key in _ROUTED if isinstance(count := getattr(text, key, None), int)}


@contextlib.contextmanager
def explained(problem: str, advice: str) -> Iterator[None]:
    """Turn what transformers raises into a `CheckpointError`; the cause stays attached."""
    try:
        yield
    except GlobeError:
        raise
    except _RAISED as error:
        if is_exhaustion(error):
            raise
        said = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {said[:300]}{'…' if len(said) > 300 else ''}"
        raise CheckpointError(f"{problem} ({reason}): {advice}") from error
