"""Damage and mix-ups between the commands: found where each of them promises it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from globe import CheckpointError, CompressConfig, OutputError, compress, evaluate, export_dense, sweep
from globe.checkpoint.manifest import MANIFEST, verify_files
from globe.cli.main import main
from globe.measure.settings import EvaluateConfig
from globe.run import prepare as prepare_module
from globe.run import scope as scope_module
from globe.run.observer import Observers
from globe.sweeps.settings import SweepConfig
from tests.tiny_sources import write_source

QUICK = CompressConfig(keep=0.8, steps=3, calibrate="none", allocation="uniform")


def factors_of(folder: Path) -> Path:
    """The file with the factors of the first scope."""
    return next(folder.glob("model-00001-of-*.safetensors"))


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "source"
    write_source(folder)
    return folder


@pytest.fixture(scope="module")
def compressed(source: Path) -> Path:
    compress(source, source.with_name("small"), QUICK)
    return source.with_name("small")


@pytest.fixture
def copy(compressed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(compressed, tmp_path / "copy")


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors in place; the metadata stays."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def factor(tensors: dict[str, torch.Tensor], ending: str) -> torch.Tensor:
    return next(tensor for name, tensor in tensors.items() if name.endswith(ending))


def is_refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        AutoModelForCausalLM.from_pretrained(path)


def test_every_file_is_verified(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy)]) == 0
    assert "every byte" in capsys.readouterr().out
    for path in [path for path in sorted(copy.rglob("*")) if path.is_file()]:
        for place in (0, path.stat().st_size // 2, -1):
            original = path.read_bytes()
            flip(path, place)
            with pytest.raises(CheckpointError):
                verify_files(copy)
            path.write_bytes(original)
    verify_files(copy)
    flip(copy / "config.json")
    assert main(["verify", str(copy)]) == 1
    assert "changed since it was written: config.json" in capsys.readouterr().err


def test_export_and_evaluate_verify_first(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(factors_of(copy))
    for refused in (
        lambda: export_dense(copy, tmp_path / "dense"),
        lambda: evaluate(copy, EvaluateConfig(max_tokens=8, length=4)),
    ):
        with pytest.raises(CheckpointError, match="changed since it was written: model-00001"):
            refused()
    assert main(["evaluate", str(copy), "--reference", "none"]) == 1
    assert "model-00001" in capsys.readouterr().err
    assert not list(tmp_path.glob("dense*"))
    export_dense(copy, tmp_path / "dense", verify=False)


def test_a_card_of_ones_own_is_no_obstacle(copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("# My model")
    export_dense(copy, tmp_path / "dense")
    verify_files(tmp_path / "dense")


def test_factors_of_another_run_do_not_load(source: Path, copy: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "other", CompressConfig(keep=0.8, steps=4, calibrate="none", allocation="uniform"))
    shutil.copy(factors_of(tmp_path / "other"), factors_of(copy))
    is_refused(copy, "is of another compression")
    with pytest.raises(CheckpointError, match="is of another compression"):
        export_dense(copy, tmp_path / "dense", verify=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_do_not_load(copy: Path, tmp_path: Path, value: float) -> None:
    rewrite(factors_of(copy), lambda tensors: factor(tensors, "_adapters").view(-1)[7].fill_(value))
    is_refused(copy, "has NaN or Inf in .*_adapters")
    with pytest.raises(CheckpointError, match="_adapters holds"):
        export_dense(copy, tmp_path / "dense", verify=False)


def test_an_export_checks_shapes(copy: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("_codes"))
        tensors[name] = tensors[name][:, :-1].contiguous()

    rewrite(factors_of(copy), cut)
    with pytest.raises(CheckpointError, match=r"_codes is torch.float32 of shape .*config.json describes \(6, "):
        export_dense(copy, tmp_path / "dense", verify=False)


def test_a_model_saved_again_keeps_its_identity(compressed: Path, copy: Path) -> None:
    AutoModelForCausalLM.from_pretrained(compressed).save_pretrained(copy)
    assert not (copy / MANIFEST).exists()  # it is of the files that were there before
    shards = list(copy.glob("model-*.safetensors"))
    for path in shards:
        if path.stat().st_mtime < (copy / "config.json").stat().st_mtime - 1:
            path.unlink()
    again = AutoModelForCausalLM.from_pretrained(copy)
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, AutoModelForCausalLM.from_pretrained(compressed)(ids).logits)
    section = json.loads((copy / "config.json").read_text())["quantization_config"]
    assert section["run"] == json.loads((compressed / MANIFEST).read_text())["run"]


def killed(source: Path, output: Path, config: CompressConfig, monkeypatch: pytest.MonkeyPatch, fits: int) -> Path:
    """A compression that is killed in the fit after so many."""
    fit, calls = scope_module.fit_bank, 0

    def fit_or_die(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > fits:
            raise Killed
        return fit(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(scope_module, "fit_bank", fit_or_die)
        with pytest.raises(Killed):
            compress(source, output, config)
    return output.with_name(f"{output.name}.partial")


class Notes(Observers):
    def __init__(self) -> None:
        super().__init__(())
        self.said: list[str] = []

    def prepare(self, task: str) -> None:
        self.said.append(task)


@pytest.mark.parametrize("damage", ["file", "record", "file is gone"])
def test_what_was_finished_and_is_damaged_is_done_again(
    source: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    partial = killed(source, tmp_path / "out", QUICK, monkeypatch, 2)
    file = {"record": partial / "unfinished" / "scope-00000.json"}.get(damage, factors_of(partial))
    file.unlink() if damage == "file is gone" else flip(file, file.stat().st_size // 2)
    notes = Notes()
    compress(source, tmp_path / "out", QUICK, [notes])
    assert any("damaged" in note for note in notes.said) == (damage != "record")
    for path in compressed.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    verify_files(tmp_path / "out")


@pytest.mark.parametrize("change", ["one byte", "one expert", "config"])
def test_a_source_that_changed_is_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    own = shutil.copytree(source, tmp_path / "own")
    killed(own, tmp_path / "out", QUICK, monkeypatch, 1)
    shard = sorted(own.glob("*.safetensors"))[-1]
    if change == "one byte":
        flip(shard)
    elif change == "one expert":
        rewrite(shard, lambda tensors: next(iter(tensors.values())).zero_())
    else:
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(ValueError, match="fingerprint was"):
        compress(own, tmp_path / "out", QUICK)
    compress(own, tmp_path / "out", QUICK, overwrite=True)


def test_a_source_that_changes_during_the_run_ends_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, fit = shutil.copytree(source, tmp_path / "own"), scope_module.fit_bank

    def fit_and_change(*arguments: Any, **settings: Any) -> Any:
        flip(sorted(own.glob("*.safetensors"))[0])
        return fit(*arguments, **settings)

    monkeypatch.setattr(scope_module, "fit_bank", fit_and_change)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        compress(own, tmp_path / "out", QUICK)
    assert not list((tmp_path / "out.partial" / "unfinished").glob("scope-*"))


def test_calibration_is_taken_up_by_a_run_that_was_killed_planning(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompressConfig(keep=0.7, steps=2, calibrate="samples")
    compress(source, tmp_path / "whole", config)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.allocation, "allocated", die)
        with pytest.raises(Killed):
            compress(source, tmp_path / "out", config)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "calibrate", None)
        patch.setattr(prepare_module, "sample_windows", None)
        compress(source, tmp_path / "out", config)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_calibration_is_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CompressConfig(keep=0.7, steps=2, calibrate="samples", allocation="uniform")
    compress(source, tmp_path / "whole", config)
    partial = killed(source, tmp_path / "out", config, monkeypatch, 1)
    flip(partial / "unfinished" / "calibration.safetensors")
    notes = Notes()
    compress(source, tmp_path / "out", config, [notes])
    assert any("calibrating again" in note for note in notes.said)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_state_of_a_stream_is_not_gone_on_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompressConfig(keep=0.7, steps=3, scope="model", stream=True, calibrate="none")
    compress(source, tmp_path / "whole", config)
    monkeypatch.setattr("globe.experts.streamed.SAVE_SECONDS", 0.0)

    class Die(Notes):
        def step(self, *_: object) -> None:
            raise Killed

    with pytest.raises(Killed):
        compress(source, tmp_path / "out", config, [Die()])
    flip(tmp_path / "out.partial" / "unfinished" / "state-0-0.safetensors")
    notes = Notes()
    compress(source, tmp_path / "out", config, [notes])
    assert any("from the start" in note for note in notes.said)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_interrupted_export_starts_over_and_touches_no_compression(
    source: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("globe.run.export.write_json", die)
        with pytest.raises(Killed):
            export_dense(compressed, tmp_path / "dense")
    assert (tmp_path / "dense.partial").exists()
    export_dense(compressed, tmp_path / "dense")
    verify_files(tmp_path / "dense")
    killed(source, tmp_path / "out", QUICK, monkeypatch, 1)
    with pytest.raises(ValueError, match="command was 'compress', now 'export'"):
        export_dense(compressed, tmp_path / "out")


def test_a_sweep_is_verified_and_damaged_records_are_made_again(tmp_path: Path) -> None:
    grid = SweepConfig(
        keep=(0.7,),
        layers=("3",),
        common=CompressConfig(keep=0.75, steps=1, calibrate="none"),
        evaluate=EvaluateConfig(max_tokens=64, length=32),
    )
    first = sweep("shipped", tmp_path / "grid", grid)
    verify_files(tmp_path / "grid")
    record = tmp_path / "grid" / "points" / "00000.json"
    flip(record, record.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"points/00000\.json"):
        verify_files(tmp_path / "grid")
    again = sweep("shipped", tmp_path / "grid", grid)
    assert again.points[0].evaluation == first.points[0].evaluation
    verify_files(tmp_path / "grid")


def test_an_output_that_is_the_source_is_never_replaced(compressed: Path, tmp_path: Path) -> None:
    dense = export_dense(compressed, tmp_path / "dense")
    with pytest.raises(OutputError, match="the model that is read"):
        compress(dense, dense, QUICK, overwrite=True)
    verify_files(dense)
