"""No model with random factors: refuse a checkpoint whose factors are not the ones that its config.json describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key

from globe.checkpoint.header import read_header, read_metadata
from globe.errors import CheckpointError
from globe.model.experts import GlobeExperts
from globe.model.names import is_factor
from globe.typed import shown

RUN_METADATA = "globe_run"
"""In the metadata of a file with factors: the run that made them."""
_NAMED = 8


def check_run(files: Iterable[str | Path], run: str | None) -> None:
    """Raise `CheckpointError` unless all safetensors files with factors say that they are of the `run`."""
    for file in files:
        path = Path(file)
        stated = read_metadata(path, path.name).get(RUN_METADATA)
        if run is not None and stated != run and any(is_factor(tensor.name) for tensor in read_header(path, path.name)):
            raise CheckpointError(
                f"{file} is of another compression (run {shown(stated)}) than its config.json (run {run}): "
                "fetch the checkpoint again or repeat the compression"
            )


def check_factors_in_files(
    model: PreTrainedModel, files: Iterable[str], conversions: Sequence[WeightTransform]
) -> None:
    """Compare the factors that the model has with those in the files, by their headers.

    transformers would fill a missing factor with random numbers and only mention it, and would not look at the shape of
    one that is offloaded to disk.

    Args:
        model: on the meta device, its experts factorised.
        files: safetensors.
        conversions: how transformers will rename the files' tensors.

    Raises `CheckpointError` naming the factors that are missing, not expected, or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if is_factor(name)}
    stored = _factors_in_files(model, files, conversions)
    _refuse("lacks", expected.keys() - stored.keys(), "the checkpoint is incomplete")
    _refuse("has", stored.keys() - expected.keys(), "its config.json does not mention them")
    wrong = {f"{name} {stored[name]} instead of {shape}" for name, shape in expected.items() if stored[name] != shape}
    _refuse("has factors of a wrong shape,", wrong, "its config.json does not describe them")


def check_factors_loaded(model: PreTrainedModel) -> None:
    """The same for a model loaded from a state dict: raise `CheckpointError` naming the factors that got no value."""
    missing = {
        name
        for name, parameter in model.named_parameters()
        if is_factor(name) and not getattr(parameter, "_is_hf_initialized", False)
    }
    _refuse("lacks", missing, "the state dict is incomplete")


def check_finite_factors(model: nn.Module) -> None:
    """Raise `CheckpointError` naming the factors that hold NaN or Inf; those that are offloaded are not looked at."""
    broken = {
        name
        for name, parameter in model.named_parameters()
        if is_factor(name) and not parameter.is_meta and parameter.is_floating_point() and not is_finite(parameter)
    }
    _refuse("has NaN or Inf in", broken, "its files are damaged")


def check_coded(model: nn.Module) -> None:
    """Raise `CheckpointError` naming the coded families whose parts do not fit; offloaded ones are not looked at."""
    broken = {
        f"{path}.{spec.family}"
        for path, module in model.named_modules()
        if isinstance(module, GlobeExperts)
        for spec in module.globe_coded
        if not module.globe_is_sound(spec)
    }
    _refuse("has rows and paths that do not fit each other in", broken, "its files are damaged")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinities, without a mask of its size."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def _factors_in_files(
    model: PreTrainedModel, files: Iterable[str], conversions: Sequence[WeightTransform]
) -> Mapping[str, tuple[int, ...]]:
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    state_dict = model.state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        path = Path(file)
        for tensor in read_header(path, path.name):
            if is_factor(tensor.name):
                name, _ = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, state_dict)
                shapes[name] = tensor.shape
    return shapes


def _refuse(problem: str, names: Iterable[str], reason: str) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
        raise CheckpointError(
            f"the compressed checkpoint {problem} {', '.join(listed[:_NAMED])}{more}: {reason}; "
            "fetch it again or repeat the compression"
        )
