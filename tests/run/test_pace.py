"""What is foreseen of fits, which are done for a moment: whatever the settings, and in proportion to the work."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest

from globe import CompressConfig, inspect
from globe.run import pace
from globe.run.outline import outline
from globe.terms import CodeMap, WarmStartName
from tests.tiny_sources import write_source

ALONE = CompressConfig(keep=0.7, calibrate="none", allocation="uniform")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pace") / "source"
    write_source(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        *({"codes": codes} for codes in get_args(CodeMap)),
        *({"warm_start": warm_start} for warm_start in get_args(WarmStartName)),
        {"solver": "am"},
        {"support": 1},
        {"stream": True},
        {"share_families": False},
        {"scope": "model"},
        {"calibrate": "samples"},
    ],
    ids=str,
)
def test_fits_of_any_settings_are_foreseen(source: Path, settings: dict[str, Any]) -> None:
    foreseen = inspect(source, dataclasses.replace(ALONE, **settings)).foreseen
    assert 0 < foreseen.working < 3600


def test_a_fit_takes_its_warm_start_and_all_its_steps(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_fit_times", lambda *_: (7.0, 0.5))
    num_banks, taken = len(outline(source, ALONE).scopes), dict[int, float]()
    for steps in (1, 10):
        taken[steps] = inspect(source, dataclasses.replace(ALONE, steps=steps)).foreseen.working
    assert taken[1] == pytest.approx(num_banks * 7.5)
    assert taken[10] == pytest.approx(num_banks * 12)
    twice = dataclasses.replace(ALONE, layers=(0,))
    assert inspect(source, twice).foreseen.working == pytest.approx(7 + 0.5 * 500)


def test_large_experts_are_tried_small(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[pace.BankShape]()

    def times(_: Any, shape: pace.BankShape, __: bool) -> tuple[float, float]:
        tried.append(shape)
        return 0.0, 1.0

    monkeypatch.setattr(pace, "_fit_times", times)
    shape = pace.BankShape(768, 2048, 7168, rank=1024, num_bases=192)
    config = CompressConfig(keep=0.5, steps=100).fit_config(shape)
    seconds = pace._fitting_time(config, shape, is_weighed=False)
    (small,) = tried
    assert small.original_parameters <= 3 * 2**18 * 1.01
    assert small.rows / small.columns == pytest.approx(shape.rows / shape.columns, rel=0.01)
    assert small.rank / small.rows == pytest.approx(0.5, rel=0.01)
    assert seconds == pytest.approx(100 * shape.step_multiply_adds / small.step_multiply_adds)
