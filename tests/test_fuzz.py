from __future__ import annotations

from pathlib import Path

import pytest

from tests import fuzz as fuzz_module
from tests.fuzz import Case, build_outputs, build_sources, fuzz


def test_a_sample_of_mutated_files_ends_well_or_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m tests.fuzz` is the whole of it, and holds each to two seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz_module, "MOST_SECONDS", 20.0)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    cases: list[Case] = []
    fuzz(tmp_path, range(30), 0, cases.append, (build_sources, build_outputs))
    assert [case for case in cases if case.outcome not in ("success", "refused")] == []
    assert {case.outcome for case in cases} == {"success", "refused"}
