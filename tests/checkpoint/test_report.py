"""A report in Python and in a notebook."""

from __future__ import annotations

import pydoc
import sys
from types import SimpleNamespace

import pytest

import globe
from globe import Report, SettingsError
from globe.checkpoint.report import CodedReport
from globe.typed import field_docs

PART = CodedReport(3, "up", 1000, 500, 0, 0, 1.0, 0.1, [0.1], [4.0], [0] * 17)
REPORT = Report("a<b>", "f", {}, {}, [], [PART, PART], 4000, 1000)


def test_a_report_is_shown_in_a_line_and_as_a_table() -> None:
    shown = repr(REPORT)
    assert shown == (
        "Report(source: a<b>, experts: 4.000 bits a weight, whole model: 1.00 kB of 4.00 kB, relative error: 0.1000, "
        "layers: 1)"
    )
    assert "<td>a&lt;b&gt;</td>" in REPORT._repr_html_()


def test_a_report_becomes_a_frame_where_pandas_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    first = REPORT.to_pandas()[0]
    assert first == {"layer": 3, "family": "up", "error": 0.1, "stored_bytes": 500, "bits": 4.0, "num_bases": 0}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SettingsError, match="pip install pandas"):
        REPORT.to_pandas()


@pytest.mark.parametrize(
    "name", ["CompressConfig", "EvaluateConfig", "SweepConfig", "FitConfig", "Report", "Evaluation"]
)
def test_help_tells_what_each_field_means(name: str) -> None:
    kind = getattr(globe, name)
    told = " ".join(pydoc.plain(pydoc.render_doc(kind)).replace("|", " ").split())
    docs = field_docs(kind)
    assert docs
    assert [field for field, doc in docs.items() if f"{field}: {doc}" not in told] == []
