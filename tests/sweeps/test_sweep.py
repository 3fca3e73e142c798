from __future__ import annotations

import csv
import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from globe import CompressConfig, EvaluateConfig, OutputError, SettingsError, SweepConfig, compress, evaluate, sweep
from globe.cli.main import main
from globe.plan.scopes import compact
from globe.sweeps import sweep as sweep_module
from globe.sweeps.settings import parse_layers
from globe.sweeps.view import draw_sweep, sweep_table, table_csv
from tests.tiny_sources import write_source, write_tokenizer

QUICK = EvaluateConfig(max_tokens=256, length=64)
GRID = SweepConfig(
    keep=(0.7, 1e-5), layers=("0", "2"), common=CompressConfig(keep=0.75, steps=2, calibrate="none"), evaluate=QUICK
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of letters."""
    source = tmp_path_factory.mktemp("source")
    write_source(source)
    write_tokenizer(source, string.ascii_lowercase + string.ascii_uppercase[:22])
    return source


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "grid"
    sweep(source, folder, GRID)
    return folder


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and "models" not in path.parts
    }


def without_seconds(content: str) -> dict[str, Any]:
    record = json.loads(content)["record"]
    return {name: value for name, value in record.items() if name != "seconds"}


def test_a_point_is_what_compress_and_evaluate_give(source: Path, folder: Path, tmp_path: Path) -> None:
    report = compress(source, tmp_path / "out", CompressConfig(keep=0.7, layers=(2,), steps=2, calibrate="none"))
    expected = evaluate(tmp_path / "out", QUICK, reference=source)
    result = sweep(source, folder, GRID)
    assert [point.settings["keep"] for point in result.points] == [0.7, 0.7, 1e-5, 1e-5]
    assert [point.settings["layers"] for point in result.points] == ["0", "2"] * 2
    point = result.points[1]
    assert point.evaluation == expected
    assert (point.error, point.kept, point.compressed_bytes) == (report.error, report.kept, report.compressed_bytes)
    assert result.original == evaluate(source, QUICK)
    assert result.original_bytes == report.original_bytes


def test_a_point_out_of_reach_is_recorded_and_the_sweep_goes_on(source: Path, folder: Path) -> None:
    failed = [point for point in sweep(source, folder, GRID).points if point.failure is not None]
    assert [point.settings["keep"] for point in failed] == [1e-5, 1e-5]
    assert all("out of reach" in str(point.failure) and point.evaluation is None for point in failed)


def test_only_records_are_left(folder: Path) -> None:
    records = {f"points/{number:05d}.json" for number in range(4)}
    assert files(folder).keys() == {"run.json", "original.json", "globe_manifest.json", *records}


def test_what_a_killed_write_left_is_removed(source: Path, folder: Path) -> None:
    before = files(folder)
    for name in ("run.json", "original.json", "points/00001.json"):
        (folder / f"{name}.0123abcd.tmp").write_text("{")
    sweep(source, folder, GRID)
    assert files(folder).keys() == before.keys()


def test_models_are_kept_when_asked_for(source: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(GRID, keep=(0.7,), layers=("0",), save_models=True)
    result = sweep(source, tmp_path / "grid", config)
    again = evaluate(tmp_path / "grid" / "models" / "00000", QUICK, reference=source)
    assert again == result.points[0].evaluation


@pytest.mark.parametrize(("stage", "after"), [("compress", 1), ("evaluate_model", 2)])
def test_a_killed_sweep_goes_on_after_the_last_finished_point(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, after: int
) -> None:
    calls: list[object] = []
    real = getattr(sweep_module, stage)

    def killed(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, stage, killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(source, tmp_path / "grid", GRID)
    before = {name: text for name, text in files(tmp_path / "grid").items() if name.startswith("points")}
    assert len(before) == 1
    sweep(source, tmp_path / "grid", GRID)
    now, expected = files(tmp_path / "grid"), files(folder)
    assert before.items() <= now.items()
    assert now.keys() == expected.keys()
    assert not (tmp_path / "grid" / "models").exists()
    for name, text in expected.items():
        if name == "globe_manifest.json":
            continue  # sums over the seconds too
        assert without_seconds(now[name]) == without_seconds(text)


def test_a_finished_sweep_loads_nothing(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "place_model", None)
    monkeypatch.setattr(sweep_module, "compress", None)
    assert len(sweep(source, folder, GRID).points) == 4


def test_other_settings_in_the_same_folder_are_named(source: Path, folder: Path) -> None:
    other = dataclasses.replace(GRID, keep=(0.7,), common=CompressConfig(keep=0.75, steps=3, calibrate="none"))
    with pytest.raises(SettingsError, match=r"keep was \[0.7, 1e-05\], now \[0.7\]; steps was 2, now 3"):
        sweep(source, folder, other)


def test_a_folder_with_other_things_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="holds files"):
        sweep(source, tmp_path, GRID)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": ()}, "keep holds"),
        ({"codes": ("ridge", "ridge")}, "each once"),
        ({"layers": ("first",)}, "layers 'first' is not understood"),
        ({"common": CompressConfig(keep=0.75, layers=(1,))}, "layers is an axis"),
        ({"common": CompressConfig(rank_ratio=0.5, basis_ratio=0.5)}, "leave out bits, rank_ratio"),
        ({"common": CompressConfig(bits=3)}, "chooses rank and bases by keep: leave out bits"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        SweepConfig(**settings)


def test_what_is_common_may_say_any_keep() -> None:
    """Or there could be no settings of banks in it; every point has its own."""
    config = SweepConfig(keep=(0.7, 0.6), common=CompressConfig(keep=0.3, steps=7))
    assert [(at.keep, at.steps) for at in map(config.at, config.points())] == [(0.7, 7), (0.6, 7)]
    assert SweepConfig().at(SweepConfig().points()[0]).bits is None


@given(st.sets(st.integers(0, 40), min_size=1))
def test_layers_are_read_as_they_are_written(indices: set[int]) -> None:
    assert parse_layers(compact(sorted(indices)).replace(" ", "")) == tuple(sorted(indices))


def test_the_table_holds_every_point(source: Path, folder: Path) -> None:
    result = sweep(source, folder, GRID)
    rows = list(csv.DictReader(table_csv(result).decode().splitlines()))
    assert [row["keep"] for row in rows] == ["original", "0.7", "0.7", "1e-05", "1e-05"]
    for row, point in zip(rows[1:], result.points, strict=True):
        assert row["failure"] == (point.failure or "")
        if point.evaluation is not None:
            assert float(row["kl"]) == point.evaluation.kl
            assert float(row["error_down"]) == (point.family_errors or {})["down"]

    table = sweep_table(result)
    assert table.row_count == 5
    assert "out of reach" in str(table.caption)


@pytest.mark.parametrize("change", [{}, {"keep": (0.7,)}, {"layers": ("0",)}, {"keep": (0.7,), "layers": ("0",)}])
def test_every_shape_of_grid_is_drawn(source: Path, folder: Path, change: dict[str, Any]) -> None:
    result = sweep(source, folder, GRID)
    config = dataclasses.replace(GRID, **change)
    points = [p for p in result.points if p.settings in config.points()]
    shown = dataclasses.replace(result, config=config, points=points, source="$a_{ [/x]\x1b[2J\u202e")  # no mathematics
    assert draw_sweep(shown).startswith(b"\x89PNG")


def test_the_command_prints_the_table_and_writes_the_picture(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--keep",
        "0.7",
        "0.00001",
        "--layers",
        "0",
        "--common.steps",
        "2",
        "--common.calibrate",
        "none",
        "--evaluate.max-tokens",
        "256",
    )
    status = main(["sweep", str(source), "-o", str(tmp_path / "grid"), *arguments])
    out = capsys.readouterr().out
    assert status == 0
    assert "keep 1e-05: failed" in out
    assert "1 of 2 points failed" in out
    assert {"sweep.csv", "sweep.png"} < {path.name for path in (tmp_path / "grid").iterdir()}
    assert main(["sweep", str(source), "-o", str(tmp_path / "grid"), *arguments]) == 0
    assert "going on after 2 of 2 points" in capsys.readouterr().out
