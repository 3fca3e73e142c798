"""What transformers makes of a checkpoint's configuration, without weights, and whether the files agree with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint
from globe.errors import CheckpointError, UnsupportedModelError
from globe.model.expert_modules import RoutedExperts, factor_names
from globe.model.names import FactorNames


def model_names(checkpoint: Checkpoint) -> FactorNames:
    """Where transformers keeps the experts of this model, from its configuration alone.

    Raises `UnsupportedModelError` if transformers does not know the model, or GloBE its experts.
    """
    return factor_names(empty_model(checkpoint))


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of the checkpoint's configuration, on the meta device.

    Raises `UnsupportedModelError` if transformers cannot build it without remote code.
    """
    try:
        config = CONFIG_MAPPING[checkpoint.config.get("model_type", "")].from_dict(checkpoint.config)
        named = [getattr(transformers, name, None) for name in checkpoint.config.get("architectures") or ()]
        known = [found for found in named if isinstance(found, type) and issubclass(found, PreTrainedModel)]
        with torch.device("meta"):
            if known:  # of a model of text and pictures, more than its language model
                return known[0]._from_config(config)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"transformers cannot build {checkpoint.folder} (model_type {checkpoint.config.get('model_type')!r}) "
            f"without remote code: {error}"
        ) from error


def check_same_experts(layers: Mapping[int, ExpertLayer], experts: Iterable[RoutedExperts]) -> None:
    """Raise unless files and model agree on every layer's experts, down to what the files' shapes cannot tell."""
    in_model = {found.layer: found for found in experts}
    if missing := sorted(layers.keys() - in_model.keys()):
        raise CheckpointError(f"layers {missing} have experts in the files but not in the model of config.json")
    for index, layer in layers.items():
        layout = in_model[index].layout
        on_disk = (layer.num_experts, layer.intermediate_size, layer.hidden_size)
        expected = (layout.num_experts, layout.intermediate_size, layout.hidden_size)
        if on_disk != expected:
            raise CheckpointError(
                f"{layer.prefix} holds {on_disk[0]} experts of {on_disk[1]} x {on_disk[2]}; config.json describes "
                f"{expected[0]} of {expected[1]} x {expected[2]}"
            )
        if layer.layout == "fused" and layer.interleaved == layout.is_concatenated:
            raise UnsupportedModelError(
                f"{type(in_model[index].module).__name__} is not supported: in which order {layer.prefix} stores the "
                "rows of gate and up is not known"
            )
