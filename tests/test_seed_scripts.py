"""The seed documents' commands, as they are written there."""

from __future__ import annotations

import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def best_errors(printed: str) -> list[float]:
    """After each step."""
    rows = [line.split() for line in printed.splitlines() if re.match(r"\s+\d+ ", line)]
    return [float(row[-1]) for row in rows]


@pytest.mark.parametrize(
    "arguments",
    [("--steps", "20", "--use-single-layer", "--layer-idx", "12"), ("--steps", "8", "--max-experts", "128")],
)
def test_training_shows_an_error_that_never_rises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    script = ROOT / "test_qwen_training.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--rank-ratio", "0.75", "--basis-ratio", "0.5", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    errors = best_errors(capsys.readouterr().out)
    assert len(errors) == int(arguments[1]) + 1
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]
    assert (tmp_path / "trajectory.png").stat().st_size > 10_000


def test_the_single_layer_script_runs_both_solvers(tmp_path: Path) -> None:
    """In a process of its own, as it is started; it imports the other."""
    command = [sys.executable, str(ROOT / "test_single_layer.py"), "--steps", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(best_errors(done.stdout)) == 5 + 41
    assert {path.name for path in tmp_path.glob("*.png")} == {"trajectory_am.png", "trajectory_varpro.png"}
