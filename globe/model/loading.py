"""Models as transformers sees them: every one that GloBE builds or loads comes from here, one choice of the class, and
the report of what was loaded looked at.

What transformers raises on the way, of whatever kind, becomes a `GlobeError` that says what to do. No code of a
checkpoint runs.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

import globe.model.register  # noqa: F401  (registers the native format)
from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.checkpoint.header import FLOAT_DTYPES
from globe.checkpoint.quantized import quant_method
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.checkpoint.side_files import CONFIG
from globe.checkpoint.stacks import check_finite
from globe.errors import CheckpointError, UnsupportedModelError
from globe.machine.device import AUTO, usable_device
from globe.machine.memory import explained_exhaustion
from globe.model.configuration import explained, read_config, text_config
from globe.model.source import open_known, open_source

_LAYER = re.compile(r"(?P<stem>(?:.*\.)?layers\.)(?P<layer>\d+)\.(?P<rest>.+)")
AGAIN = "download the checkpoint again, or take a release of transformers that loads it"
_LISTED = 4
_TRIAL = 4
"""Tokens on which a model is tried when it is loaded."""


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The whole model of the checkpoint's configuration, of the class that config.json names, on the meta device.

    Raises as `read_config` does, and `UnsupportedModelError` if transformers has no class for it.
    """
    config = read_config(checkpoint)
    named = [getattr(transformers, name, None) for name in _architectures(config.architectures)]
    known = [kind for kind in named if isinstance(kind, type) and issubclass(kind, PreTrainedModel)]
    fitting = [kind for kind in known if isinstance(config, kind.config_class or ())]
    if not fitting:  # of a model of text and pictures, the named class is more than its language model
        return empty_language_model(checkpoint)
    return _build(checkpoint, fitting[0]._from_config, config)


def _architectures(entry: Any) -> list[str]:
    """The names of classes that config.json has, whatever else it has in their place."""
    return [name for name in entry if isinstance(name, str)] if isinstance(entry, list) else []


def empty_language_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """What `load` loads, on the meta device; raises as `empty_model` does."""
    config = read_config(checkpoint)
    build = functools.partial(_auto_class(config, checkpoint.folder).from_config, trust_remote_code=False)
    return _build(checkpoint, build, config)


def hollow_language_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """What `load` loads, in float32: its parameters on the meta device, the buffers that it computes itself on the CPU.

    Raises as `empty_model` does.
    """
    config = read_config(checkpoint)
    build = functools.partial(
        _auto_class(config, checkpoint.folder).from_config, trust_remote_code=False, dtype=torch.float32
    )
    return _build(checkpoint, build, config, init_empty_weights(include_buffers=False)).eval()


def _build(
    checkpoint: Checkpoint,
    build: Any,
    config: PreTrainedConfig,
    where: AbstractContextManager[Any] | None = None,
) -> PreTrainedModel:
    what = f"transformers cannot build the model that {CONFIG} of {checkpoint.folder} describes"
    with explained(what, f"correct {CONFIG}"), quiet(), where or torch.device("meta"):
        return build(config)


def _auto_class(config: PreTrainedConfig, folder: Path) -> Any:
    """What loads the language model: alone where transformers has it so, else with all that it sees."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} has no language model of model_type {config.model_type!r} that "
        f"{folder} could be run as"
    )


def check_weights(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raise `CheckpointError` unless the checkpoint has every tensor of the (empty) model, in its shape.

    transformers itself is made to load tensors of the names and shapes in the files' headers, without their data: its
    renamings, conversions and tied weights are those of the real load. The model's own experts must still be dense.
    """
    with explained(f"the tensors of {checkpoint.folder} cannot be", AGAIN):
        headers = {
            name: torch.empty(tensor.shape, dtype=TORCH_DTYPES.get(tensor.dtype, torch.uint8), device="meta")
            for name, tensor in checkpoint.tensors.items()
        }
    _load(checkpoint, type(model), None, config=model.config, state_dict=headers, device_map={"": "meta"})


def check_language_model(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """The same for what `load` loads, where that is another class than the (empty) model's."""
    alone = empty_language_model(checkpoint)
    if type(alone) is not type(model):
        check_weights(checkpoint, alone)


def load(model: str | Path, device: str = AUTO, dtype: torch.dtype | None = None) -> Any:
    """A causal language model from a folder or the Hub, compressed or not, in its own precision or in `dtype`, for
    inference; tried on a few tokens. compressed-tensors' experts are dequantised as `open_source` reads them, which
    needs no package and takes several widths.

    Raises `CheckpointError` naming the tensors that are missing or of another shape, and with the cause when
    transformers cannot load or run the model; `SettingsError` for a device that is not here; `OutOfMemoryError`.
    """
    device = usable_device(device)
    checkpoint = open_known(model)
    is_packed = quant_method(checkpoint) == "compressed-tensors"
    if is_packed:
        checkpoint = open_source(model)
    config = read_config(checkpoint)
    place = {} if device == "cpu" else {"device_map": {"": device}}
    loaded = _load(
        checkpoint,
        type(empty_language_model(checkpoint)) if is_packed else _auto_class(config, checkpoint.folder),
        None if is_packed else str(checkpoint.fetched()),
        config=config,
        state_dict=dict(checkpoint.read_many(checkpoint.tensors)) if is_packed else None,
        dtype="auto" if dtype is None else dtype,
        trust_remote_code=False,
        **place,
    ).eval()
    _try(loaded, checkpoint.folder)
    return loaded


def _load(checkpoint: Checkpoint, kind: Any, path: str | None, **settings: Any) -> Any:
    """`kind.from_pretrained`, its report looked at."""
    folder = checkpoint.folder
    exhausted = "take a machine or --device with more memory, or --calibrate none --allocation uniform to compress only"
    with (
        explained_exhaustion(f"loading {folder}", exhausted),
        explained(f"{folder} cannot be loaded by transformers", AGAIN),
        quiet(),
    ):
        loaded, report = kind.from_pretrained(path, **settings, output_loading_info=True, ignore_mismatched_sizes=True)
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"{folder} holds an adapter beside the weights, which transformers applies where peft is installed and the "
            "output would be without: merge it (merge_and_unload, save_pretrained), or move adapter_config.json away"
        )
    _check_report(checkpoint, loaded, report)
    return loaded


def _check_report(checkpoint: Checkpoint, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for tensors that transformers filled with random numbers, or that it should have used."""
    name, missing = type(model).__name__, report["missing_keys"]
    random, remedy = "transformers would fill them with random numbers", _remedy(checkpoint, model, missing)
    other = [f"{key} {tuple(had)} instead of {tuple(wanted)}" for key, had, wanted in report["mismatched_keys"]]
    ignored = _ignored(model, report["unexpected_keys"])
    for tensors, fault in (
        (missing, f"lacks tensors of {name}: {_some(missing)}; {random}"),
        (other, f"has tensors of another shape than {name} of its {CONFIG}: {_some(other)}; {random}"),
        (ignored, f"has tensors that {name} of its {CONFIG} would run without: {_some(ignored)}"),
    ):
        if tensors:
            raise CheckpointError(f"{checkpoint.folder} {fault}. {remedy}")


def _remedy(checkpoint: Checkpoint, model: PreTrainedModel, missing: Collection[str]) -> str:
    """What to do about tensors that do not fit."""
    named = _architectures(checkpoint.config.get("architectures"))
    lacks_head_only = missing and not any(key.startswith(f"{model.base_model_prefix}.") for key in missing)
    if named and type(model).__name__ not in named and lacks_head_only:
        return (
            f"{CONFIG} names {_some(named)}, which cannot be run as a language model; "
            "--calibrate none --allocation uniform compresses it as it is"
        )
    return f"Download the checkpoint again, or correct its {CONFIG}"


def _ignored(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Of the tensors that the model did not take, those that it would need if config.json told it.

    These are the weights and biases of modules that it has, and layers like its own beyond the last one. Heads that
    predict more tokens, scales and other models' parts are not.
    """
    modules = {key.rpartition(".")[0] for key, _ in model.named_parameters()}
    own, layers = defaultdict[str, set[str]](set), defaultdict[tuple[str, int], dict[str, str]](dict)
    for key in model.state_dict():
        if match := _LAYER.fullmatch(key):
            own[match["stem"]].add(match["rest"])
    of_modules: list[str] = []
    for key in unexpected:
        module, _, leaf = key.rpartition(".")
        if leaf in ("weight", "bias") and module in modules:
            of_modules.append(key)
        elif match := _LAYER.fullmatch(key):
            layers[match["stem"], int(match["layer"])][match["rest"]] = key
    dropped = [tensors for (stem, _), tensors in sorted(layers.items()) if tensors.keys() <= own[stem]]
    said = getattr(text_config(model.config), "num_nextn_predict_layers", None)
    num_heads = max(0, said) if isinstance(said, int) else 0
    return of_modules + [key for tensors in dropped[num_heads:] for key in tensors.values()]


@torch.no_grad()
def _try(model: Any, folder: Path) -> None:
    """Run the model on a few tokens, so that what its configuration makes impossible is said before any work."""
    with running(model, folder):
        ids = torch.arange(1, 1 + _TRIAL, device=model.device)[None] % vocabulary(model)
        if bool(model(input_ids=ids).logits.isnan().any()):
            raise CheckpointError(
                f"{folder} computes NaN from its first tokens on: its weights are damaged or do not fit its {CONFIG}"
            )


@contextlib.contextmanager
def running(model: Any, folder: str | Path | None = None) -> Iterator[None]:
    """Explain what transformers raises while it runs a model, out of memory included; a weight that is no number is
    named."""
    name = str(folder or model.config.name_or_path) or type(model).__name__
    try:
        with (
            explained_exhaustion(f"running {name} on {model.device}", OUT_OF_MEMORY),
            explained(f"{name} cannot be run", f"its {CONFIG} does not describe a model that computes: correct it"),
        ):
            yield
    except CheckpointError:
        _check_numbers(name)
        raise


def _check_numbers(folder: str) -> None:
    """Raise `CheckpointError` naming the first tensor in the folder's files that holds a NaN or an infinity."""
    if Path(folder).is_dir():
        checkpoint = open_checkpoint(folder)
        floats = [tensor.name for tensor in checkpoint.tensors.values() if tensor.dtype in FLOAT_DTYPES]
        for name, tensor in checkpoint.read_many(floats):
            check_finite(tensor, name)


OUT_OF_MEMORY = (
    "evaluate with a smaller --batch, compress with --calibrate none --allocation uniform, or choose another --device"
)
"""What to do when a model does not fit."""


def window_length(model: Any, most: int) -> int:
    """Tokens in a window: `most`, or as many as the model can take."""
    longest = getattr(text_config(model.config), "max_position_embeddings", None)
    return min(most, longest) if isinstance(longest, int) and longest > 1 else most


def placeholders(model: Any) -> list[int]:
    """The tokens that stand for pictures and sounds; they mean nothing without them."""
    entries = vars(model.config).items()
    tokens = {
        value for key, value in entries if re.search(r"(image|video|audio|vision|boi|eoi)\w*_token_(id|index)$", key)
    }
    return sorted(value for value in tokens if isinstance(value, int) and 0 <= value < vocabulary(model))


def text_tokens(model: Any) -> list[int]:
    """The vocabulary without them."""
    left_out = set(placeholders(model))
    return [token for token in range(vocabulary(model)) if token not in left_out]


def vocabulary(model: Any) -> int:
    """Tokens that the model knows."""
    return text_config(model.config).vocab_size


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and bars: what matters in its report becomes an error."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
