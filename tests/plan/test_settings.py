from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from globe.errors import SettingsError
from globe.measure.settings import EvaluateConfig
from globe.plan.settings import CompressConfig
from globe.sweeps.settings import SweepConfig
from globe.train.config import FitConfig


@pytest.mark.parametrize(
    ("given", "name", "meant"),
    [
        ({"keep": 0.5, "scope": 4}, "scope", "4"),
        ({"layers": range(3)}, "layers", (0, 1, 2)),
        ({"layers": [0, 1]}, "layers", (0, 1)),
        ({"layers": 3}, "layers", (3,)),
        ({"layers": np.array([1, 2])}, "layers", (1, 2)),
        ({"keep": 0.5, "steps": np.int64(7)}, "steps", 7),
        ({"keep": 0.5, "steps": 1e3}, "steps", 1000),
        ({"bits": 3}, "bits", 3.0),
        ({"bits": np.float32(2.5)}, "bits", 2.5),
        ({"keep": np.float32(0.5)}, "keep", 0.5),
        ({"keep": torch.tensor(0.5)}, "keep", 0.5),
        ({"keep": 0.5, "stream": np.True_}, "stream", True),
        ({"calibrate": Path("text.txt")}, "calibrate", "text.txt"),
        ({"families": "up"}, "families", ("up",)),
        ({"families": {"down", "gate"}}, "families", ("gate", "down")),
    ],
)
def test_what_has_one_reading_is_read_so(given: dict[str, Any], name: str, meant: object) -> None:
    found = getattr(CompressConfig(**given), name)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": "0.6"}, "keep is '0.6'; it must be a finite number or null"),
        ({"keep": float("nan")}, "keep is nan; it must be a finite number or null"),
        ({"keep": 2}, r"keep is 2; it must be above 0 and below 1 \(2 % is 0.02\)"),
        ({"keep": -0.5}, "keep is -0.5"),
        ({"keep": True}, "keep is True"),
        ({"keep": [0.5]}, r"keep is \[0.5\]"),
        ({"bits": 16}, r"bits is 16; stored bits per original weight must be from 1\.5 to 8: for more, give keep"),
        ({"bits": 8.01}, r"bits is 8\.01; .* from 1\.5 to 8"),
        ({"bits": 1.49}, r"bits is 1\.49; .* from 1\.5 to 8"),
        ({"bits": 0}, "bits is 0"),
        ({"bits": float("nan")}, "bits is nan"),
        ({"bits": True}, "bits is True"),
        ({"bits": "3"}, "bits is '3'"),
        ({"rank_ratio": float("nan"), "basis_ratio": 0.5}, "rank_ratio is nan"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"steps": 10**30}, "steps is 1000"),
        ({"steps": True}, "steps is True"),
        ({"calibration_tokens": -1}, "calibration_tokens is -1"),
        ({"support": 0}, "support is 0; it must be at least 1"),
        ({"max_experts": 0}, "max_experts is 0"),
        ({"layers": (0, "a")}, r"layers\[1\] is 'a'; it must be a whole number"),
        ({"layers": (-1,)}, r"layers \[-1\] has a negative one"),
        ({"scope": 0}, "scope '0' is unknown"),
        ({"scope": "-1"}, "scope '-1' is unknown"),
        ({"scope": "\u00b2"}, "scope .* is unknown"),
        ({"scope": None}, "scope is None; it must be text"),
        ({"stream": "yes"}, "stream is 'yes'; it must be true or false"),
        ({"solver": "sgd"}, "solver 'sgd' is unknown; choose varpro or am"),
        ({"warm_start": "zeros"}, "warm_start 'zeros' is unknown; choose procrustes, svd, "),
        ({"factor_dtype": "int16"}, "factor_dtype 'int16' is unknown; choose source, float32, "),
        ({"factor_dtype": torch.float16}, "factor_dtype is torch.float16"),
        ({"allocation": "best"}, "allocation 'best' is unknown; choose sensitivity or uniform"),
        ({"families": ("gate", 3)}, r"families\[1\] is 3; it must be gate, up or down"),
        ({"device": "gpu"}, "device 'gpu' is unknown; choose .* a GPU of Nvidia or AMD is cuda"),
        ({"device": "nowhere:0"}, "device 'nowhere:0' is unknown"),
        ({"calibrate": None}, "calibrate is None"),
    ],
)
def test_what_has_none_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CompressConfig(**given)


@pytest.mark.parametrize("budget", [{}, {"bits": 3}], ids=str)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scope", "model"),
        ("share_families", False),
        ("max_experts", 100),
        ("stream", True),
        ("activation", "silu"),
        ("codes", "softmax"),
        ("support", 2),
        ("solver", "am"),
        ("warm_start", "svd"),
        ("steps", 7),
        ("factor_dtype", "bfloat16"),
    ],
)
def test_settings_of_banks_need_a_budget_of_banks(budget: dict[str, Any], name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=rf"{name} is a setting of banks, .*: give keep with it"):
        CompressConfig(**budget, **{name: value})
    assert getattr(CompressConfig(keep=0.5, **{name: value}), name) == value  # pyright: ignore[reportArgumentType]


def test_without_a_budget_experts_are_coded_in_four_bits() -> None:
    bare = CompressConfig()
    assert bare.is_coded
    assert bare.bits is None
    assert bare.resolved().bits == 4
    assert bare.resolved().resolved() == bare.resolved()
    assert CompressConfig(bits=2.5).resolved().bits == 2.5
    for banks in (CompressConfig(keep=0.5), CompressConfig(rank_ratio=0.5, basis_ratio=0.5)):
        assert not banks.is_coded
        assert banks.resolved().bits is None


@pytest.mark.parametrize("bits", [1.5, 8])
def test_the_ends_of_the_range_are_in_it(bits: float) -> None:
    assert CompressConfig(bits=bits).bits == bits


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (FitConfig, {"rank": 1, "num_bases": 1, "dtype": "float16"}, "dtype 'float16' is unknown; choose float32 or"),
        (FitConfig, {"rank": "8", "num_bases": 1}, "rank is '8'"),
        (FitConfig, {"rank": 1, "num_bases": 1, "tolerance": float("nan")}, "tolerance is nan"),
        (FitConfig, {"rank": 1, "num_bases": 1, "lambda_a": -1}, "lambda_a is -1.0; it must be at least 0"),
        (EvaluateConfig, {"length": "256"}, "length is '256'"),
        (EvaluateConfig, {"batch": 0}, "batch is 0"),
        (EvaluateConfig, {"text": None}, "text is None"),
        (SweepConfig, {"keep": (0.5, "x")}, r"keep\[1\] is 'x'"),
        (SweepConfig, {"keep": (75,)}, "75 % is 0.75"),
        (SweepConfig, {"scope": ("half",)}, "scope 'half' is unknown"),
        (SweepConfig, {"layers": ("3-1",)}, "layers 3-1 runs backwards; write 1-3"),
        (SweepConfig, {"layers": ("0-999999999999",)}, "is not understood"),
        (SweepConfig, {"common": {"steps": 3}}, "common is .* it must be a CompressConfig"),
    ],
)
def test_so_are_the_settings_of_fits_evaluations_and_sweeps(kind: type, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        kind(**given)


def test_lone_values_and_paths_are_read_in_them_too() -> None:
    assert SweepConfig(keep=0.5, scope=2, layers="0-3").points()[0]["scope"] == "2"  # pyright: ignore[reportArgumentType]
    assert EvaluateConfig(text=Path("x.txt")).text == "x.txt"  # pyright: ignore[reportArgumentType]
