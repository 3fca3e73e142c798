from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe.bank.activations import activate, check_activation, jacobian
from globe.errors import GlobeError, SettingsError
from tests.random_experts import F64

ACTIVATIONS = ["identity", "silu", "tanh"]
SCALAR = {"identity": lambda t: t, "silu": lambda t: t / (1 + math.exp(-t)), "tanh": math.tanh}
LAMBDAS = [0.0, 0.3, 0.99, 1.0]


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(t=st.floats(-30, 30), activation_lambda=st.floats(0, 1))
def test_value_is_the_homotopy(name: str, t: float, activation_lambda: float):
    expected = (1 - activation_lambda) * t + activation_lambda * SCALAR[name](t)
    found = activate(torch.tensor([t], dtype=F64), name, activation_lambda)
    assert float(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("activation_lambda", LAMBDAS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_jacobian_is_the_derivative(name: str, activation_lambda: float):
    t = torch.linspace(-12, 12, 97, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(activate(t, name, activation_lambda).sum(), t)
    torch.testing.assert_close(jacobian(t.detach(), name, activation_lambda), expected)


@pytest.mark.parametrize("name", ["silu", "tanh"])
def test_jacobian_blends_from_one_to_the_slope(name: str):
    t = torch.linspace(-4, 4, 33, dtype=F64)
    slope = jacobian(t, name, 1.0)
    assert (jacobian(t, name, 0.0) == 1).all()
    torch.testing.assert_close(jacobian(t, name, 0.25), 0.75 + 0.25 * slope)
    assert (slope - 1).abs().max() > 0.5  # the blend above would pass with a slope of 1


@pytest.mark.parametrize("activation_lambda", LAMBDAS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_inputs_are_left_alone(name: str, activation_lambda: float):
    t = torch.linspace(-2, 2, 9, dtype=F64)
    kept = t.clone()
    activate(t, name, activation_lambda)
    jacobian(t, name, activation_lambda)
    assert torch.equal(t, kept)


def test_unknown_activation_is_refused_with_the_choice():
    with pytest.raises(SettingsError, match=r"'relu' is unknown; choose one of identity, silu, tanh") as raised:
        check_activation("relu")
    assert isinstance(raised.value, GlobeError)
    for name in ACTIVATIONS:
        check_activation(name)
