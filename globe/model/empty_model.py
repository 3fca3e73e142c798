"""Whether the files of a checkpoint agree with the model that transformers makes of its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint
from globe.errors import CheckpointError, UnsupportedModelError
from globe.model.expert_modules import RoutedExperts, factor_names
from globe.model.loading import empty_model
from globe.model.names import FactorNames


def model_names(checkpoint: Checkpoint) -> FactorNames:
    """Where transformers keeps the experts of this model, from its configuration alone; raises as `empty_model` does,
    and `UnsupportedModelError` for experts that GloBE does not know.
    """
    return factor_names(empty_model(checkpoint))


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
