"""A compression on all GPUs of a machine, with processors in their place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from globe.cli.launch import gpus_for
from globe.cli.main import main
from tests.coded import write_source
from tests.kills import content

CODED = ("--bits", "3", "--calibrate", "none", "--allocation", "uniform")
TWO_GPUS = """
import sys
import torch
from globe.cli.main import main
from globe.plan import settings
torch.cuda.device_count = lambda: 2
settings.usable_device = lambda device: "cpu"
sys.exit(main())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch") / "source"
    write_source(folder, num_hidden_layers=2, num_experts=2, hidden_size=32)
    return folder


def start(source: Path, output: Path, *settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TWO_GPUS, "compress", str(source), "-o", str(output), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )


def test_only_a_device_without_a_number_stands_for_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = [gpus_for(device) for device in ("auto", "cuda", "cuda:0", "cuda:1", "cpu", "mps")]
    assert found == [4, 4, 0, 0, 0, 0]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of torchrun")
    assert gpus_for("cuda") == 0


def test_each_gpu_gets_a_process_and_the_bytes_are_those_of_one(source: Path, tmp_path: Path) -> None:
    assert main(["compress", str(source), "-o", str(tmp_path / "alone"), *CODED]) == 0
    started = start(source, tmp_path / "shared", *CODED, "--device", "cuda")
    said, complaints = started.communicate()
    assert started.returncode == 0, complaints
    assert said.startswith("starting again in 2 processes, one for each GPU")
    assert "on this cpu in 2 processes" in said
    assert content(tmp_path / "shared") == content(tmp_path / "alone")


def test_a_signal_ends_all_of_them_and_they_say_how_to_go_on(source: Path, tmp_path: Path) -> None:
    started = start(source, tmp_path / "out", "--keep", "0.7", "--steps", "100000", "--calibrate", "none")
    assert started.stdout is not None
    assert any(line.startswith("planning") for line in started.stdout)
    started.send_signal(signal.SIGINT)
    _, complaints = started.communicate()
    assert started.returncode == 128 + signal.SIGINT
    assert complaints == "interrupted: the same command goes on after the last finished scope\n"


def test_a_failure_is_told_once_and_its_status_is_passed_on(tmp_path: Path) -> None:
    started = start(tmp_path / "nothing", tmp_path / "out", *CODED)
    _, complaints = started.communicate()
    assert started.returncode == 1
    assert complaints.startswith("error: ")
    assert len(complaints.splitlines()) == 1
