from __future__ import annotations

import numpy as np
import pytest
import torch

from globe.bank.factors import Factors, compose, mix
from tests.random_experts import normal

E, P, D, R, M = 5, 6, 7, 4, 3
NUMPY = {"identity": lambda t: t, "silu": lambda t: t / (1 + np.exp(-t)), "tanh": np.tanh}


def naive_mix(codes: np.ndarray, bases: np.ndarray) -> np.ndarray:
    mixed = np.zeros((len(codes), *bases.shape[1:]))
    for e in range(len(codes)):
        for j in range(len(bases)):
            mixed[e] += codes[e, j] * bases[j]
    return mixed


def test_mix_is_the_sum_over_bases():
    codes, bases = normal(E, M, seed=1), normal(M, R, D, seed=2)
    np.testing.assert_allclose(mix(codes, bases).numpy(), naive_mix(codes.numpy(), bases.numpy()))


@pytest.mark.parametrize("activation", ["identity", "silu", "tanh"])
def test_compose_is_adapter_times_activated_mixture(activation: str):
    adapters, codes, bases = normal(E, P, R), normal(E, M, seed=1), normal(M, R, D, seed=2)
    features = NUMPY[activation](naive_mix(codes.numpy(), bases.numpy()))
    expected = np.stack([adapters[e].numpy() @ features[e] for e in range(E)])
    np.testing.assert_allclose(compose(adapters, codes, bases, activation).numpy(), expected)
    np.testing.assert_allclose(Factors(adapters, codes, bases, activation).compose().numpy(), expected)


def test_compose_keeps_the_dtype_of_the_factors():
    factors = Factors(normal(E, P, R).float(), normal(E, M).float(), normal(M, R, D).float(), "tanh")
    assert factors.compose().dtype == torch.float32
    assert factors.compose().shape == (E, P, D)


def test_num_parameters_counts_what_is_stored():
    factors = Factors(normal(E, P, R), normal(E, M), normal(M, R, D), "tanh")
    assert factors.num_parameters == E * P * R + E * M + M * R * D
