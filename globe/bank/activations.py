"""The nonlinearity φ between bank and adapter, and its homotopy φ_λ(t) = (1-λ)t + λφ(t)."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from globe.errors import SettingsError
from globe.terms import Activation


def _silu_derivative(t: Tensor) -> Tensor:
    gate = torch.sigmoid(t)
    return (1 - gate).mul_(t).add_(1).mul_(gate)


def _tanh_derivative(t: Tensor) -> Tensor:
    return torch.tanh(t).square_().neg_().add_(1)


_VALUE: dict[str, Callable[[Tensor], Tensor]] = {"silu": torch.nn.functional.silu, "tanh": torch.tanh}
_DERIVATIVE: dict[str, Callable[[Tensor], Tensor]] = {"silu": _silu_derivative, "tanh": _tanh_derivative}


def check_activation(name: str) -> None:
    """Raise `SettingsError` unless `name` is a known activation."""
    if name not in get_args(Activation):
        raise SettingsError(f"activation {name!r:.60} is unknown; choose one of {', '.join(get_args(Activation))}")


def activate(t: Tensor, activation: str, activation_lambda: float = 1.0) -> Tensor:
    """φ_λ(t), elementwise; λ = 0 is the identity, λ = 1 is φ."""
    if activation == "identity" or activation_lambda == 0.0:
        return t
    value = _VALUE[activation](t)
    return value if activation_lambda == 1.0 else torch.lerp(t, value, activation_lambda)


def jacobian(t: Tensor, activation: str, activation_lambda: float = 1.0) -> Tensor:
    """dφ_λ/dt, elementwise: 1 at λ = 0, (1-λ) + λφ'(t) in between, φ'(t) at λ = 1."""
    if activation == "identity" or activation_lambda == 0.0:
        return torch.ones_like(t)
    derivative = _DERIVATIVE[activation](t)
    return derivative if activation_lambda == 1.0 else derivative.mul_(activation_lambda).add_(1 - activation_lambda)
