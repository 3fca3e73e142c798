"""From factorised experts back to dense ones, in memory: what `model.dequantize()` does."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from globe.errors import UnsupportedModelError
from globe.model.experts import GlobeExperts
from globe.model.names import BANKS, is_factor


def restore_dense(model: PreTrainedModel) -> None:
    """Compose every expert and give the experts modules their own class and parameters back, in place.

    The model then takes the memory of the dense one, and `save_pretrained` writes a dense checkpoint. Raises
    `UnsupportedModelError` if weights are offloaded or sharded.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta or isinstance(parameter, DTensor):
            raise UnsupportedModelError(
                f"cannot make the experts dense while {name} is offloaded or sharded; load the model on one device"
            )
    for module in model.modules():
        if isinstance(module, GlobeExperts):
            _restore(module, model.dtype)
    if hasattr(model.base_model, BANKS):
        delattr(model.base_model, BANKS)
    # holds only the conversions that loading the factors used; without it, saving uses all of the family's
    del model._weight_conversions


@torch.no_grad()
def _restore(module: GlobeExperts, dtype: torch.dtype) -> None:
    layout = module.globe_layout
    parameters = dict(module.named_parameters(recurse=False))
    like = next(iter(parameters.values())).new_empty(0, dtype=dtype)
    dense = {name: like.new_zeros(shape) for name, shape in layout.dense_parameters.items()}
    for experts in module.globe_batches(parameters, range(layout.num_experts)):
        for expert, gate_up, down in zip(experts, *module.globe_matrices(parameters, experts, like), strict=True):
            dense["gate_up_proj"][expert] = gate_up.T if layout.is_transposed else gate_up
            dense["down_proj"][expert] = down if layout.is_transposed else down.T
    for name in [name for name in (*parameters, *dict(module.named_children())) if is_factor(name)]:
        delattr(module, name)
    module.globe_cache = None
    del module.globe_layout, module.globe_uses, module.globe_coded, module.globe_cache
    module.__class__ = type(module).__bases__[1]
    for name, tensor in dense.items():
        module.register_parameter(name, nn.Parameter(tensor))
