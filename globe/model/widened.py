"""Embeddings and heads that keep the dtype in which they are stored and compute in float32: of a large vocabulary they
take as much as a layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

_ROWS = 8192
"""Of a head that are float32 at a time."""


def widen(module: Any) -> bool:
    """Have a module with a weight of any dtype compute in float32, if it is an embedding or a linear layer without
    anything of its own; returns whether it is."""
    forward: Any = {nn.Embedding: _embed, nn.Linear: _multiply}.get(type(module))
    if forward is None or getattr(module, "bias", None) is not None:
        return False
    module.forward = functools.partial(forward, module)
    return True


def _embed(module: Any, ids: Tensor) -> Tensor:
    return functional.embedding(ids, module.weight).float()


def _multiply(module: Any, x: Tensor) -> Tensor:
    found: Any = _Product.apply(x.float(), module.weight)
    return found


class _Product(Function):
    """x Wᵀ, x (..., N) float32 and W (K, N) of any dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        outputs = x.new_empty(*x.shape[:-1], len(weight))
        for part, rows in zip(outputs.split(_ROWS, -1), weight.split(_ROWS), strict=True):
            part.copy_(x @ rows.float().mT)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        parts = zip(gradient.split(_ROWS, -1), weight.split(_ROWS), strict=True)
        return sum((part @ rows.float() for part, rows in parts), torch.zeros(())), None
