"""The seed documents' commands, as they are written there."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(tmp_path: Path, *arguments: str) -> list[float]:
    """Run a script at the root; returns the best error after each step."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s+\d+ ", line)]
    return [float(row[-1]) for row in rows]


@pytest.mark.parametrize(
    "arguments",
    [("--use-single-layer", "--layer-idx", "12"), ("--max-experts", "128")],
)
def test_training_shows_an_error_that_never_rises(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    script = str(ROOT / "test_qwen_training.py")
    errors = run(tmp_path, script, "--steps", "20", "--rank-ratio", "0.75", "--basis-ratio", "0.5", *arguments)
    assert len(errors) == 21
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]
    assert (tmp_path / "trajectory.png").stat().st_size > 10_000


def test_the_single_layer_script_runs_both_solvers(tmp_path: Path) -> None:
    errors = run(tmp_path, str(ROOT / "test_single_layer.py"), "--steps", "4")
    assert len(errors) == 5 + 41
    assert {path.name for path in tmp_path.glob("*.png")} == {"trajectory_am.png", "trajectory_varpro.png"}
