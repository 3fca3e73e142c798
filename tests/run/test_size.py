"""The budget that fits a memory, and the least that keeps a loss."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from globe import CompressConfig, EvaluateConfig, SettingsError
from globe.checkpoint.evaluation import read_evaluations
from globe.checkpoint.manifest import verify_files
from globe.checkpoint.reader import open_checkpoint
from globe.cli.main import main
from globe.run import prepare as prepare_module
from globe.run.outline import outline
from globe.run.size import bits_to_fit, compress_within, least_bits
from globe.units import read_size
from tests.coded import ALONE, write_source
from tests.tiny_sources import write_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "source")
    write_tokenizer(tmp_path / "source", LETTERS)
    return tmp_path / "source"


@given(st.floats(0.3, 3), st.floats(-8, 12), st.floats(0, 0.3), st.floats(1e-4, 1))
def test_the_least_budget_is_found_in_a_few_trials(slope: float, height: float, bend: float, most: float) -> None:
    tried: list[float] = []

    def loss(bits: float) -> float:
        tried.append(bits)
        return 2.0 ** (height - slope * bits - bend * math.sin(2 * bits) / 2)

    found = least_bits(loss, most)
    calls = len(tried)
    assert calls <= 12
    assert all(1.5 - 1e-9 <= bits <= 8 + 1e-9 for bits in tried)
    if found is None:
        assert loss(8.0) > most
        return
    assert loss(found) <= most
    assert found <= 1.51 or loss(found) >= 0.8 * most or loss(found - 0.05) > most


@pytest.mark.parametrize("share", [0.3, 0.45, 0.9])
def test_what_fits_is_the_most_that_does(source: Path, share: float) -> None:
    outlined = outline(source, dataclasses.replace(ALONE, bits=None))
    num_bytes = share * outlined.original_bytes()
    bits = bits_to_fit(outlined, num_bytes)
    sizes = [outline(source, dataclasses.replace(ALONE, bits=b)) for b in (bits, min(8.0, bits + 0.01))]
    stored, more = (at.predicted_bytes(at.scopes) for at in sizes)
    assert stored <= num_bytes
    assert more > num_bytes or bits == 8
    with pytest.raises(SettingsError, match=r"cannot fit 1\.00 kB: with its experts in 1\.5 bits"):
        bits_to_fit(outlined, 1000)


def test_the_command_fits_a_size(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = sum(tensor.nbytes for tensor in open_checkpoint(source).tensors.values())
    given = ("--calibrate", "none", "--allocation", "uniform", "--layers", "0")
    wanted = f"{0.65 * total / 1000:.1f}kB"
    assert main(["compress", str(source), "-o", str(tmp_path / "out"), "--fit", wanted, *given]) == 0
    out = capsys.readouterr().out
    assert "bits fit" in out
    assert "for each 1,000 tokens of context" in out
    stored = sum(tensor.nbytes for tensor in open_checkpoint(tmp_path / "out").tensors.values())
    assert 0.97 * 0.65 * total <= stored <= 0.65 * total
    assert main(["compress", str(source), "-o", str(tmp_path / "x"), "--fit", "much"]) == 1
    assert "fit is 'much'; it must be a size such as 16GB" in capsys.readouterr().err


def test_the_smallest_within_a_loss_is_checked_and_measured_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("a line of letters, and one more.\n" * 40)
    text = EvaluateConfig(text=str(tmp_path / "text.txt"), length=32, max_tokens=128)
    calls, real = list[int](), prepare_module.run_calibration
    monkeypatch.setattr(prepare_module, "run_calibration", lambda *given: calls.append(1) or real(*given))
    report = compress_within(source, tmp_path / "out", 0.02, CompressConfig(layers=(0,)), text)
    (found,) = read_evaluations(tmp_path / "out")
    assert found.kl is not None
    assert found.kl <= 0.02
    assert report.bits is not None
    assert report.bits < 8
    assert calls == [1]
    verify_files(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]
    with pytest.raises(SettingsError, match="leave out bits"):
        compress_within(source, tmp_path / "other", 0.02, ALONE, text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16e9), ("1.5 GiB", 1.5 * 2**30), ("7", 7), ("2k", 2000), ("2KB", 2000), ("3mib", 3 * 2**20)],
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert read_size(text) == size
    assert read_size(f"{text} or so") is None
