from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from globe.errors import GlobeError, SettingsError
from globe.train.config import FitConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"rank is 0; it must be at least 1"),
        ({"num_bases": 0}, r"num_bases is 0"),
        ({"max_steps": 0}, r"max_steps is 0"),
        ({"align_steps": 0}, r"align_steps is 0"),
        ({"patience": 0}, r"patience is 0"),
        ({"activation": "relu"}, r"activation 'relu' is unknown"),
        ({"codes": "gumbel"}, r"codes 'gumbel' is unknown"),
        ({"solver": "sgd"}, r"solver 'sgd' is unknown; choose varpro or am"),
        ({"support": 0}, r"support is 0; with 4 bases it must be 1 to 4"),
        ({"support": 5}, r"support is 5; with 4 bases it must be 1 to 4"),
        ({"temperature": 11.0}, r"temperature 11.0 must lie in .*\[0.05, 10.0\]"),
        ({"temperature": 0.01}, r"temperature 0.01 must lie in"),
        ({"min_temperature": 0.0}, r"all above 0"),
        ({"min_temperature": 3.0, "max_temperature": 2.0}, r"must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message) as raised:
        FitConfig(**({"rank": 3, "num_bases": 4} | settings))
    assert isinstance(raised.value, GlobeError)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 2, 9), r"rank 3 exceeds the 2 rows or 9 columns of an expert; choose a rank of at most 2"),
        ((8, 9, 2), r"rank 3 exceeds the 9 rows or 2 columns"),
        ((3, 9, 9), r"4 bases for 3 experts save nothing; choose at most 3 bases"),
    ],
)
def test_a_bank_that_does_not_fit_the_experts_is_refused(shape: tuple[int, int, int], message: str):
    with pytest.raises(SettingsError, match=message):
        FitConfig(rank=3, num_bases=4).check_shape(*shape)


def test_limits_themselves_are_allowed():
    FitConfig(rank=3, num_bases=4).check_shape(4, 3, 3)
    config = FitConfig(rank=1, num_bases=1, support=1, max_steps=1, temperature=0.05, min_temperature=0.05)
    assert config.support == 1


def test_a_configuration_is_frozen_and_names_its_precision():
    config = FitConfig(rank=3, num_bases=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert config.torch_dtype == torch.float32
    assert FitConfig(rank=3, num_bases=4, dtype="float64").torch_dtype == torch.float64
