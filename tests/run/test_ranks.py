"""One compression by several processes: its bytes, what it says, and what becomes of it when one of them dies."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from globe.cli.main import main
from globe.measure import runnable, streamed
from globe.model.expert_modules import RoutedExperts
from globe.run import scope
from tests.coded import write_source
from tests.kills import content
from tests.ranks import run_in_ranks
from tests.tiny_sources import write_tokenizer

LAYERS = 3
LETTERS = "".join(map(chr, range(ord("A"), ord("A") + 48)))
CODED = ("--bits", "3", "--calibrate", "none", "--allocation", "uniform")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "source"
    write_source(folder, num_hidden_layers=LAYERS, num_experts=2, hidden_size=32)
    return folder


@pytest.fixture(scope="module")
def coded(source: Path) -> Path:
    assert main(["compress", str(source), "-o", str(source.with_name("coded")), *CODED]) == 0
    return source.with_name("coded")


def test_torchrun_starts_processes_that_make_the_bytes_of_one(source: Path, coded: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "globe", "compress", str(source), "-o", str(tmp_path / "out"), *CODED),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "out") == content(coded)
    for word in ("reads", "planning", *(f"layer {layer}:" for layer in range(LAYERS)), "experts coded"):
        assert sum(line.startswith(word) for line in result.stdout.splitlines()) == 1


def test_layers_that_make_up_for_each_other_have_the_bytes_of_one_process(source: Path, tmp_path: Path) -> None:
    """All but down is coded by whoever is free."""
    command = ("compress", str(source), "--bits", "3", "-o")
    assert main([*command, str(tmp_path / "alone")]) == 0
    assert run_in_ranks(2, [*command, str(tmp_path / "shared")], tmp_path / "said") == [0, 0]
    assert content(tmp_path / "shared") == content(tmp_path / "alone")


def test_four_processes_make_the_same_bytes(source: Path, coded: Path, tmp_path: Path) -> None:
    """One more than there are layers."""
    assert run_in_ranks(4, ["compress", str(source), "-o", str(tmp_path / "out"), *CODED], tmp_path / "said") == [0] * 4
    assert content(tmp_path / "out") == content(coded)
    assert not any((tmp_path / "said" / str(rank)).read_text() for rank in (1, 2, 3))


def test_banks_are_fitted_by_two_processes_as_by_one(source: Path, tmp_path: Path) -> None:
    settings = ("--keep", "0.7", "--steps", "2", "--calibrate", "none")
    assert main(["compress", str(source), "-o", str(tmp_path / "alone"), *settings]) == 0
    command = ["compress", str(source), "-o", str(tmp_path / "shared"), *settings]
    assert run_in_ranks(2, command, tmp_path / "said") == [0, 0]
    assert content(tmp_path / "shared") == content(tmp_path / "alone")


def test_when_one_dies_the_run_ends_and_one_alone_goes_on(
    source: Path, coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def die_at_work(rank: int) -> None:
        if rank == 1:
            scope.code_family = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    command = ["compress", str(source), "-o", str(tmp_path / "out"), *CODED]
    assert run_in_ranks(2, command, tmp_path / "said", die_at_work) == [1, -signal.SIGKILL]
    said = " ".join((tmp_path / "said" / "0").read_text().split())
    assert "error: another process of this run ended before its work was done" in said
    assert main(command) == 0
    assert f"going on after {LAYERS - 1} of {LAYERS} scopes" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(coded)


@pytest.fixture(scope="module")
def large(source: Path) -> tuple[Path, list[str]]:
    """A model that is run a layer at a time, and a compression that measures it on a text of two batches."""
    folder = source.with_name("large")
    write_source(folder, num_hidden_layers=5, num_experts=2, hidden_size=32)
    write_tokenizer(folder, LETTERS)
    (text := source.with_name("text.txt")).write_text(LETTERS[::3] * 100)
    return folder, ["compress", str(folder), "--bits", "3", "--calibrate", str(text), "--calibration-tokens", "768"]


@pytest.fixture(scope="module")
def measured(large: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("measured")
    assert run_in_ranks(1, [*large[1], "-o", str(folder / "out")], folder / "said", too_large) == [0]
    return folder / "out"


def too_large(_: int) -> None:
    runnable.MEMORY_SHARE = 0.0


@pytest.mark.parametrize("size", [2, 3])
def test_a_model_larger_than_memory_is_measured_by_all(
    large: tuple[Path, list[str]], measured: Path, tmp_path: Path, size: int
) -> None:
    def note_layers(rank: int) -> None:
        too_large(rank)
        for name in ("LayerSums", "adding_squares"):
            setattr(streamed, name, functools.partial(noted, rank, getattr(streamed, name)))

    def noted(rank: int, original: Callable[..., Any], experts: RoutedExperts, *rest: Any, **named: Any) -> Any:
        with (tmp_path / f"layers {rank}").open("a") as file:
            file.write(f"{experts.layer}")
        return original(experts, *rest, **named)

    command = [*large[1], "-o", str(tmp_path / "out")]
    assert run_in_ranks(size, command, tmp_path / "said", note_layers) == [0] * size
    assert content(tmp_path / "out") == content(measured)
    turns = {2: ["024420", "1331"], 3: ["0330", "1441", "22"]}[size]
    assert [(tmp_path / f"layers {rank}").read_text() for rank in range(size)] == turns
    said = (tmp_path / "said" / "0").read_text()
    assert said.count("measuring what errors cost, a layer at a time") == 1
    assert not any((tmp_path / "said" / str(rank)).read_text() for rank in range(1, size))


@pytest.mark.parametrize("settings", [("--bits", "3"), ("--keep", "0.7", "--steps", "2")], ids=["coded", "banks"])
def test_what_errors_cost_alone_is_measured_by_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    """On random tokens."""

    def note_rank(rank: int) -> None:
        too_large(rank)
        measure = streamed.adding_squares
        streamed.adding_squares = lambda *given: (tmp_path / f"measured {rank}").touch() or measure(*given)

    monkeypatch.setattr(runnable, "MEMORY_SHARE", 0.0)
    command = ["compress", str(source), *settings, "--calibrate", "none", "-o"]
    assert main([*command, str(tmp_path / "alone")]) == 0
    assert run_in_ranks(2, [*command, str(tmp_path / "shared")], tmp_path / "said", note_rank) == [0, 0]
    assert content(tmp_path / "shared") == content(tmp_path / "alone")
    assert {path.name for path in tmp_path.glob("measured *")} == {"measured 0", "measured 1"}


@pytest.mark.parametrize("phase", ["LayerSums", "adding_squares"])
def test_when_one_dies_while_the_model_is_measured_another_number_goes_on(
    large: tuple[Path, list[str]], measured: Path, tmp_path: Path, phase: str
) -> None:
    def die(rank: int) -> None:
        too_large(rank)
        if rank == 2:
            setattr(streamed, phase, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))

    command = [*large[1], "-o", str(tmp_path / "out")]
    assert run_in_ranks(3, command, tmp_path / "said", die) == [1, 1, -signal.SIGKILL]
    said = " ".join((tmp_path / "said" / "0").read_text().split())
    assert "error: another process of this run ended before its work was done" in said
    assert not (tmp_path / "said" / "1").read_text()
    assert run_in_ranks(2, command, tmp_path / "said again", too_large) == [0, 0]
    assert content(tmp_path / "out") == content(measured)


def test_other_commands_are_refused(coded: Path, tmp_path: Path) -> None:
    assert run_in_ranks(2, ["verify", str(coded)], tmp_path / "said") == [1, 1]
    assert "verify runs in one process" in (tmp_path / "said" / "0").read_text()
    assert not (tmp_path / "said" / "1").read_text()
