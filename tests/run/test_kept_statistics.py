"""Statistics that are kept in a file and used again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from globe import CompressConfig, SettingsError, compress
from globe.run import prepare as prepare_module
from tests.coded import write_source

CODED = CompressConfig(bits=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "source"
    write_source(folder)
    return folder


@pytest.fixture(scope="module")
def kept(source: Path) -> Path:
    """Statistics of a run on all layers and families, whose output is beside them."""
    file = source.with_name("statistics.safetensors")
    compress(source, source.with_name("out"), dataclasses.replace(CODED, save_statistics=str(file)))
    return file


def test_a_run_on_kept_statistics_makes_the_same_bytes_without_running_the_model(
    source: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "run_calibration", None)
    monkeypatch.setattr(prepare_module, "with_sensitivities", None)
    report = compress(source, tmp_path / "out", dataclasses.replace(CODED, statistics=str(kept)))
    assert report.calibration is not None
    assert report.calibration.text == "samples"
    assert (report.uncalibrated_because, report.uniform_because) == (None, None)
    for path in tmp_path.glob("out/*.safetensors"):
        found, expected = load_file(path), load_file(kept.with_name("out") / path.name)
        assert found.keys() == expected.keys()
        assert all(found[name].equal(expected[name]) for name in found)


def test_a_part_of_what_was_measured_is_enough(source: Path, kept: Path, tmp_path: Path) -> None:
    config = CompressConfig(bits=4, statistics=str(kept), layers=(1,), families=("down",))
    report = compress(source, tmp_path / "out", config)
    assert [(part.layer, part.family) for part in report.coded] == [(1, "down")]


def test_what_was_not_measured_is_said(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    compress(source, tmp_path / "out", CompressConfig(bits=3, layers=(0,), save_statistics=str(file)))
    with pytest.raises(SettingsError, match=r"other layers, families or settings, and lack 1\.inner and \d+ more"):
        compress(source, tmp_path / "more", dataclasses.replace(CODED, statistics=str(file)))


def test_statistics_of_another_model_are_refused(kept: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "other", initializer_range=0.1)
    with pytest.raises(SettingsError, match="are of another model than"):
        compress(tmp_path / "other", tmp_path / "out", dataclasses.replace(CODED, statistics=str(kept)))


def test_what_is_no_file_of_statistics_is_refused(source: Path, kept: Path, tmp_path: Path) -> None:
    save_file(load_file(kept), tmp_path / "plain")
    (tmp_path / "cut").write_bytes(kept.read_bytes()[:-8])
    for name, said in (("plain", "holds no statistics"), ("cut", "cannot be read"), ("missing", "cannot be read")):
        with pytest.raises(SettingsError, match=said):
            compress(source, tmp_path / "out", dataclasses.replace(CODED, statistics=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistics": "a", "calibrate": "text"}, "leave calibrate out"),
        ({"save_statistics": "a", "calibrate": "none"}, "no statistics to save"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CompressConfig(**settings)  # pyright: ignore[reportArgumentType]
