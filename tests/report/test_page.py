from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from globe import CheckpointError, CompressConfig, OutputError, compress
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import REPORT, BankReport, Report
from globe.cli.main import main
from globe.report.charts import Curve, curve_chart, strip_chart, summary_curve
from globe.report.inventory import bytes_by_kind, read_spectra, singular_values
from globe.report.page import render, write_report
from tests.model.compressed import LAYERS
from tests.tiny_sources import write_source

VOID = {"meta"}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in order; gathers text, addresses and drawings."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(content)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_source(folder / "source")
    compress(folder / "source", folder / "out", CompressConfig(keep=0.7, steps=4))
    return folder / "out"


def rewritten(folder: Path, tmp_path: Path, change: Any) -> Path:
    """A copy of the model with another report."""
    shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((folder / REPORT).read_text())
    change(content)
    (tmp_path / "copy" / REPORT).write_text(json.dumps(content))
    return tmp_path / "copy"


def test_the_page_holds_what_the_report_says(folder: Path) -> None:
    report, page = Report.read(folder), Page(render(folder))
    for bank in report.banks:
        for families in bank.errors.values():
            for error in families.values():
                assert f"{error:.4f}" in page.text
    for heading in ("Bytes", "Error by layer and family", "Error by expert", "Course of the fits", "Spectra", "Bases",
                    "Time by phase", "Fits", "Settings and versions"):  # fmt: skip
        assert heading in page.words
    for phase in ("reading", "warm start", "fit", "storing"):
        assert phase in page.words
    assert page.tags.count("h1") == 1
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert sum("layer" in str(label) for label in labels) >= 3


def test_the_page_needs_nothing_beside_it(folder: Path) -> None:
    content = render(folder)
    assert not re.search(r"https?:|@import|url\(", content)
    assert not {"script", "link", "img", "iframe"} & set(Page(content).tags)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": (1,)},
        {"scope": "model"},
        {"share_families": False},
        {"families": ("up",)},
        {"codes": "entmax15", "solver": "am", "activation": "silu", "support": 3},
    ],
)
def test_every_kind_of_compression_has_a_page(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_source(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "out", CompressConfig(keep=0.7, steps=3, **settings))
    page = Page(render(tmp_path / "out"))
    assert "could show" not in page.text
    assert page.tags.count("svg") >= 4


def test_text_from_files_is_escaped(folder: Path, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"><img src=x onerror=y>"

    def change(content: dict[str, Any]) -> None:
        content["source"] = content["fingerprint"] = content["versions"]["globe"] = evil
        content["config"][evil] = evil
        bank = content["banks"][0]
        bank["outcome"] = evil
        bank["families"] = [evil]
        bank["metrics"]["phases"][evil] = 1.0

    page = Page(render(rewritten(folder, tmp_path, change)))
    assert not {"script", "img"} & set(page.tags)
    assert evil in page.text


def test_optional_fields_may_be_missing(folder: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["seconds"], content["peak_memory_bytes"], content["error"]
        content["versions"], content["config"] = {}, {}
        for bank in content["banks"]:
            del bank["expert_errors"], bank["steps"], bank["metrics"]

    page = Page(render(rewritten(folder, tmp_path, change)))
    assert "Error by expert" not in page.words
    assert "Time by phase" not in page.words
    assert "Fits" in page.words


def test_a_report_alone_has_a_page_that_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / REPORT, tmp_path / REPORT)
    page = Page(render(tmp_path))
    assert "do not tell all" in page.text
    assert "Spectra" not in page.words


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["banks"][0]["shape"].update(rank="many", num_bases="some"),
        lambda content: content["banks"][0]["errors"].update({"first": {"gate": 0.1}}),
        lambda content: content["banks"][0]["steps"].update(error=["low"] * 5),
        lambda content: content.update(banks=[]),
    ],
)
def test_values_of_the_wrong_kind_are_refused(folder: Path, tmp_path: Path, change: Any) -> None:
    with pytest.raises(CheckpointError, match=r"report\.json: banks"):
        render(rewritten(folder, tmp_path, change))


def test_numbers_that_are_not_finite_are_left_out_of_the_drawings(folder: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        bank = content["banks"][0]
        bank["outcome"] = "non_finite"
        bank["steps"]["raw_error"][-1] = math.nan
        bank["steps"]["error"][-1] = math.inf
        bank["expert_errors"]["0"]["gate"][0] = math.nan

    content = render(rewritten(folder, tmp_path, change))
    assert not re.search(r'd="[^"]*(nan|inf)', content)
    assert "met NaN or Inf" in content


def test_many_banks_stay_small(folder: Path) -> None:
    report = Report.read(folder)
    steps = {
        name: [values[0] * (1 - 0.001 * step) for step in range(500)] for name, values in report.banks[0].steps.items()
    }
    steps["step"] = [float(step) for step in range(500)]
    banks = [
        dataclasses.replace(
            report.banks[0],
            layers=[layer],
            families=[family],
            errors={str(layer): {family: 0.1 + 0.001 * layer}},
            expert_errors={str(layer): {family: [0.1 + 0.001 * expert for expert in range(128)]}},
            steps=steps,
        )
        for layer in range(60)
        for family in ("gate", "up", "down")
    ]
    copy = folder.parent / "many"
    copy.mkdir()
    (copy / REPORT).write_text(json.dumps(dataclasses.replace(report, banks=banks).to_json()))
    path = write_report(copy)
    assert path.stat().st_size < 400_000
    page = Page(path.read_text())
    assert "median of 180 banks, and their range" in page.text


def test_bytes_add_up(folder: Path) -> None:
    report = Report.read(folder)
    sizes = {entry.kind: entry for entry in bytes_by_kind(open_checkpoint(folder))}
    assert sum(entry.before for entry in sizes.values()) == report.original_bytes
    assert sum(entry.after for entry in sizes.values()) == report.compressed_bytes
    assert sizes["adapters"].after + sizes["bases"].after + sizes["codes"].after == 4 * sum(
        bank.shape.parameters for bank in report.banks
    )
    assert sizes["attention"].before == sizes["attention"].after > 0


def test_spectra_are_those_of_the_stored_factors(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    spectra = list(read_spectra(checkpoint))
    assert [entry.bank.layers for entry in spectra] == [(layer,) for layer in range(LAYERS)]
    bases = checkpoint.read("model.layers.1.mlp.experts.globe_banks.gate_up_down.bases")
    expected = torch.linalg.svdvals(bases.flatten(1).double())
    assert spectra[1].bases == pytest.approx((expected / expected[0]).tolist(), abs=1e-7)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 100))
def test_singular_values_agree_with_the_decomposition(rows: int, columns: int, seed: int) -> None:
    matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed))
    expected = torch.linalg.svdvals(matrices.double())
    torch.testing.assert_close(singular_values(matrices), expected / expected[:, :1], rtol=1e-6, atol=1e-6)


@given(
    st.lists(st.tuples(st.floats(), st.floats()), max_size=8),
    st.booleans(),
)
def test_whatever_is_drawn_stays_inside_the_picture(points: list[tuple[float, float]], logarithmic: bool) -> None:
    points = [(place, value) for place, value in points if not abs(place) > 1e100 and not abs(value) > 1e100]
    chart = curve_chart("title", [Curve("", points)], "x", logarithmic=logarithmic)
    drawable = [p for p in points if all(map(math.isfinite, p)) and (p[1] > 0 or not logarithmic)]
    assert (chart is None) == (not drawable)
    if chart is not None:
        path = re.search(r'class="s0 (?:line" d="M([^"]*)"|dot" cx="([^"]*)" cy="([^"]*)")', str(chart.svg))
        assert path is not None
        numbers = (
            [tuple(map(float, point.split(","))) for point in path[1].split("L")]
            if path[1]
            else [(float(path[2]), float(path[3]))]
        )
        assert all(0 <= x <= 360 and 0 <= y <= 220 for x, y in numbers)


def test_a_curve_that_ends_early_keeps_its_last_value() -> None:
    curve = summary_curve("", [[(0, 1.0), (1, 0.5)], [(0, 3.0), (1, 2.0), (2, 1.5)], [(0, 2.0), (2, 1.0)]])
    assert list(curve.points) == [(0, 2.0), (1, 2.0), (2, 1.0)]
    assert list(curve.band) == [(0, 1.0, 3.0), (1, 0.5, 2.0), (2, 0.5, 1.5)]


def test_no_strip_without_values() -> None:
    assert strip_chart("title", {}, "layer") is None
    assert strip_chart("title", {"0": [math.nan]}, "layer") is None


def test_the_command_writes_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert main(["report", str(tmp_path)]) == 1
    assert "globe compress" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(folder, tmp_path / "missing" / "page.html")


def test_what_was_done_otherwise_than_asked_is_told(folder: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["calibration"]["streamed_because"] = "it is too large"
        content["uncalibrated_because"], content["uniform_because"] = "it cannot be run", "nothing was measured"
        content["notes"] = ["a tensor was passed over"]

    assert "Warnings" not in render(folder)
    text = Page(render(rewritten(folder, tmp_path, change))).text
    for because in ("it is too large", "it cannot be run", "nothing was measured", "a tensor was passed over"):
        assert because in text


def test_a_report_of_a_later_version_is_read(folder: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["novelty"] = content["banks"][0]["novelty"] = 1

    copy = rewritten(folder, tmp_path, change)
    assert Report.read(copy) == Report.read(folder)
    assert all(isinstance(bank, BankReport) for bank in Report.read(copy).banks)


def test_names_from_elsewhere_have_no_power_over_a_terminal_or_the_direction_of_writing(
    folder: Path, tmp_path: Path
) -> None:
    page = render(rewritten(folder, tmp_path, lambda content: content.update(source="[/x]\x1b[2J\u202e<b>")))
    assert r"[/x]\x1b[2J\u202e&lt;b&gt;" in page
