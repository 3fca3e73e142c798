"""Experts in few bits: what is stored, what is told of it, and what becomes of odd models and killed runs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from globe import CheckpointError, CompressConfig, OutputError, SettingsError, compress, export_dense, inspect
from globe.checkpoint.manifest import verify_files
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import REPORT, CodedReport, Report
from globe.experts import decoded as decoded_module
from globe.experts import on_disk
from globe.measure import runnable, samples
from globe.plan.scopes import Scope
from globe.report.inventory import ROUTED, bytes_by_kind
from globe.report.page import render
from globe.run import coding, compensation, outline, outlook
from globe.run import prepare as prepare_module
from globe.run import scope as scope_module
from globe.run.observer import Observer
from globe.terms import FAMILIES
from tests.coded import ALONE, LAYERS, D, E, P, bytes_of_experts, rewrite, write_source
from tests.model.compressed import logits
from tests.rounding import assert_equal_but_for_rounding
from tests.tiny_sources import write_tokenizer

WEIGHTS = LAYERS * 3 * E * P * D
LETTERS = "".join(map(chr, range(ord("A"), ord("A") + 48)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded") / "source"
    write_source(folder)
    return folder


@pytest.fixture(scope="module")
def coded(source: Path) -> Path:
    """A compression with everything that is measured."""
    compress(source, source.with_name("coded"), CompressConfig(bits=3))
    return source.with_name("coded")


@pytest.fixture(scope="module")
def alone(source: Path) -> Path:
    compress(source, source.with_name("alone"), ALONE)
    return source.with_name("alone")


@pytest.fixture(scope="module")
def dense(coded: Path) -> Path:
    return export_dense(coded, coded.with_name("dense"))


def experts(folder: Path, layer: int, family: str) -> Tensor:
    """(E, P, D) or (E, D, P), float64."""
    checkpoint = open_checkpoint(folder)
    names = [f"model.layers.{layer}.mlp.experts.{expert}.{family}_proj.weight" for expert in range(E)]
    return torch.stack([checkpoint.read(name).double() for name in names])


# the budget


def test_no_more_is_stored_than_was_asked_for_and_hardly_less(source: Path, tmp_path: Path) -> None:
    errors: list[float] = []
    for bits in (1.5, 8.0):
        out = tmp_path / f"{bits:g}"
        report = compress(source, out, dataclasses.replace(ALONE, bits=bits))
        stored = bytes_of_experts(out)
        assert 0.995 * bits <= 8 * stored / WEIGHTS <= bits
        assert report.bits == 8 * stored / WEIGHTS
        assert report.compressed_bytes == sum(t.nbytes for t in open_checkpoint(out).tensors.values())
        errors.append(report.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.5
    assert errors[-1] < 0.01


def test_measured_rows_take_no_more_either(coded: Path) -> None:
    assert 0.995 * 3 <= 8 * bytes_of_experts(coded) / WEIGHTS <= 3


@pytest.mark.parametrize("families", [("gate", "up"), ("gate",), ("up",), ("down",), ("up", "down")], ids="+".join)
def test_families_left_out_stay_and_the_others_have_the_budget(
    source: Path, tmp_path: Path, families: tuple[Any, ...]
) -> None:
    out = tmp_path / "out"
    report = compress(source, out, dataclasses.replace(ALONE, families=families))
    halves = {("gate",): 1, ("up",): 1, ("up", "down"): 1}.get(families, 0)
    stored = bytes_of_experts(out) - halves * LAYERS * E * P * D * 4
    assert 0.99 * 3 <= 8 * stored / (WEIGHTS * len(families) / 3) <= 3
    assert [(part.layer, part.family) for part in report.coded] == [(n, f) for n in range(LAYERS) for f in families]
    export_dense(out, tmp_path / "dense")
    for layer in range(LAYERS):
        for family in FAMILIES:
            same = torch.equal(experts(source, layer, family), experts(tmp_path / "dense", layer, family))
            assert same == (family not in families)
    load = AutoModelForCausalLM.from_pretrained
    model = load(out)
    assert_equal_but_for_rounding(logits(model), logits(load(tmp_path / "dense")))
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in load(out).state_dict().items())


def test_experts_too_small_for_their_widths_and_scales_are_refused_before_any_work(tmp_path: Path) -> None:
    write_source(tmp_path / "source", num_experts=2, moe_intermediate_size=2)
    with pytest.raises(SettingsError, match=r"bits 1\.5 is out of reach: widths and scales .* take \d\.\d\d bits"):
        compress(tmp_path / "source", tmp_path / "out", CompressConfig(bits=1.5))


@pytest.mark.parametrize("rows", [4, 8])
def test_rows_too_short_to_close_are_counted_as_they_are_stored(tmp_path: Path, rows: int) -> None:
    """A path has at least 12 entries."""
    write_source(tmp_path / "source", moe_intermediate_size=rows)
    report = compress(tmp_path / "source", tmp_path / "out", dataclasses.replace(ALONE, bits=4))
    assert report.bits is not None
    assert 3.95 < report.bits <= 4
    export_dense(tmp_path / "out", tmp_path / "dense")
    load = AutoModelForCausalLM.from_pretrained
    assert_equal_but_for_rounding(logits(load(tmp_path / "out")), logits(load(tmp_path / "dense")))


# the default, and what it falls back to


def test_without_settings_a_model_is_run_and_coded_in_four_bits(source: Path, tmp_path: Path) -> None:
    report = compress(source, tmp_path / "out")
    assert (report.config["bits"], report.config["keep"]) == (4, None)
    assert report.bits is not None
    assert 3.98 < report.bits <= 4
    assert report.banks == []
    assert report.calibration is not None
    assert report.calibration.text == "samples"
    assert (report.uncalibrated_because, report.uniform_because, report.uncompensated_because) == (None, None, None)
    shares = [part.compensated for part in report.coded if part.family == "down"]
    assert all(share is not None and 0 < share < 1 for share in shares)


def test_what_is_measured_lowers_the_divergence(source: Path, coded: Path, alone: Path) -> None:
    load = AutoModelForCausalLM.from_pretrained
    ids = samples.sample_windows(load(source), seed=5)

    @torch.no_grad()
    def log_p(folder: Path) -> Tensor:
        return load(folder)(input_ids=ids).logits.double().log_softmax(-1)

    p = log_p(source)
    measured, unmeasured = ((p.exp() * (p - log_p(folder))).sum(-1).mean() for folder in (coded, alone))
    assert 0 < float(measured) < float(unmeasured)


def test_a_model_too_large_to_be_run_is_coded_from_its_weights_and_says_so(
    source: Path, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runnable, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(runnable, "STREAMED_SHARE", 0.0)
    report = compress(source, tmp_path / "out", CompressConfig(bits=3))
    assert report.calibration is None
    assert "the model takes" in str(report.uncalibrated_because)
    assert "the model takes" in str(report.uniform_because)
    assert contents(alone).keys() == contents(tmp_path / "out").keys()
    for name, tensor in contents(alone).items():
        assert torch.equal(tensor, contents(tmp_path / "out")[name])


@pytest.fixture(scope="module")
def with_text(source: Path) -> tuple[Path, CompressConfig]:
    """A model with a tokenizer, and a calibration on a text."""
    own = shutil.copytree(source, source.with_name("with text"))
    write_tokenizer(own, LETTERS)
    text = own.with_name("text.txt")
    text.write_text(LETTERS[::3] * 100)
    return own, CompressConfig(bits=3, calibrate=str(text), calibration_tokens=768)


@pytest.fixture(scope="module")
def whole(with_text: tuple[Path, CompressConfig]) -> Path:
    model, config = with_text
    compress(model, model.with_name("whole"), config)
    return model.with_name("whole")


@pytest.fixture(scope="module")
def streamed(with_text: tuple[Path, CompressConfig]) -> Path:
    """The same by a machine whose memory does not hold the model."""
    model, config = with_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runnable, "MEMORY_SHARE", 0.0)
        patch.setattr(prepare_module, "load", None)
        compress(model, model.with_name("streamed"), config)
    return model.with_name("streamed")


def test_a_model_larger_than_memory_is_coded_like_one_that_fits(whole: Path, streamed: Path) -> None:
    expected, report = Report.read(whole), Report.read(streamed)
    assert report.error == pytest.approx(expected.error, rel=1e-3)
    assert expected.calibration is not None
    assert report.calibration is not None
    assert "the model takes" in str(report.calibration.streamed_because)
    assert dataclasses.replace(report.calibration, streamed_because=None) == expected.calibration
    assert (report.uncalibrated_because, report.uniform_because) == (None, None)


def test_a_model_larger_than_memory_is_calibrated_on_the_text_in_the_package(
    with_text: tuple[Path, CompressConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runnable, "MEMORY_SHARE", 0.0)
    model, config = with_text
    report = compress(model, tmp_path / "out", dataclasses.replace(config, calibrate="samples"))
    assert report.calibration is not None
    assert (report.calibration.text, report.calibration.num_tokens) == ("calibration", 768)
    assert report.calibration.streamed_because is not None


@pytest.mark.parametrize("killed", ["sensitivities_streamed", "plan_coding"])
def test_a_run_killed_on_a_model_larger_than_memory_goes_on_to_the_same_bytes(
    with_text: tuple[Path, CompressConfig],
    streamed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: str,
) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(runnable, "MEMORY_SHARE", 0.0)
    model, config = with_text
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, killed, die)
        with pytest.raises(Killed):
            compress(model, tmp_path / "out", config)
    unfinished = {path.name for path in (tmp_path / "out.partial" / "unfinished").iterdir()}
    assert ("calibration.json" in unfinished) == (killed == "plan_coding")
    if killed == "plan_coding":
        monkeypatch.setattr(prepare_module, "StreamedModel", None)  # what was finished is taken up
    compress(model, tmp_path / "out", config)
    assert_same_files(tmp_path / "out", streamed)


def contents(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def measured_only(source: Path) -> Path:
    compress(source, source.with_name("measured only"), CompressConfig(bits=3, calibrate="none"))
    return source.with_name("measured only")


@pytest.fixture(scope="module")
def calibrated_only(source: Path) -> Path:
    compress(source, source.with_name("calibrated only"), CompressConfig(bits=3, allocation="uniform"))
    return source.with_name("calibrated only")


@pytest.mark.parametrize(
    ("compressed", "calibrated", "measured"),
    [("measured_only", False, True), ("calibrated_only", True, False), ("alone", False, False)],
)
def test_statistics_and_sensitivities_are_each_left_out_alone(
    request: pytest.FixtureRequest, compressed: str, calibrated: bool, measured: bool
) -> None:
    report = Report.read(request.getfixturevalue(compressed))
    assert (report.calibration is not None) == calibrated
    assert (report.uniform_because is None) == (report.predicted_kl is not None) == measured
    assert calibrated or report.uncalibrated_because == "that is asked for"
    assert measured or report.uniform_because == "that is asked for"
    assert report.bits is not None
    assert 2.98 < report.bits <= 3


# odd models


@pytest.mark.parametrize(("zeros", "bits"), [("an expert, a family", 8), ("a layer", 2), ("all", 8)])
def test_zeros_stay_zeros_however_many_bits_there_are(source: Path, tmp_path: Path, zeros: str, bits: float) -> None:
    own = shutil.copytree(source, tmp_path / "source")
    parts = {
        "an expert, a family": r"experts\.3\.|layers\.1\.mlp\.experts\..*\.down_proj",
        "a layer": r"layers\.0\.mlp\.experts\.",
        "all": r"\.experts\.",
    }
    changed: list[str] = []

    def change(name: str, tensor: Tensor) -> Tensor:
        if re.search(parts[zeros], name):
            changed.append(name)
            return torch.zeros_like(tensor)
        return tensor

    rewrite(own, change)
    report = compress(own, tmp_path / "out", CompressConfig(bits=bits))
    assert report.bits is not None
    assert report.bits <= bits
    assert Report.read(tmp_path / "out") == report
    json.loads((tmp_path / "out" / REPORT).read_text(), parse_constant=pytest.fail)
    assert "<svg" in render(tmp_path / "out")
    export_dense(tmp_path / "out", tmp_path / "dense")
    checkpoint = open_checkpoint(tmp_path / "dense")
    assert changed
    assert not any(bool(checkpoint.read(name).any()) for name in changed)
    for part_report in report.coded:
        for expert, error in enumerate(part_report.expert_errors):
            name = f"model.layers.{part_report.layer}.mlp.experts.{expert}.{part_report.family}_proj.weight"
            assert (error == 0) == (name in changed)
    load = AutoModelForCausalLM.from_pretrained
    coded, dense = (logits(load(tmp_path / name)) for name in ("out", "dense"))
    assert_equal_but_for_rounding(coded, dense, units=50)  # products are rotated back, and experts before they multiply


def test_experts_that_no_token_reaches_are_coded_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "NUM_SAMPLES", 1)
    monkeypatch.setattr(samples, "LENGTH", 3)
    report = compress(source, tmp_path / "out", CompressConfig(bits=3))
    assert report.calibration is not None
    assert report.calibration.num_unreached > 0
    assert all(0 < error < 1 for part in report.coded for error in part.expert_errors)


def test_the_units_of_a_family_do_not_matter(source: Path, tmp_path: Path, alone: Path) -> None:
    octaves = {"layers.0.mlp.experts.": 40, "layers.1.mlp.experts.": -50}

    def shifted(name: str, tensor: Tensor, ending: str, shift: Callable[[Tensor, int], Tensor]) -> Tensor:
        (by,) = [by for layer, by in octaves.items() if layer in name and name.endswith(ending)] or [0]
        return shift(tensor, by)

    own = shutil.copytree(source, tmp_path / "source")
    rewrite(own, lambda name, tensor: shifted(name, tensor, "up_proj.weight", lambda x, by: x * 2.0**by))
    compress(own, tmp_path / "out", ALONE)
    found = contents(tmp_path / "out")
    for name, tensor in contents(alone).items():
        if "globe_" in name:
            wanted = shifted(name, tensor, "globe_up_expert_scales", lambda x, by: x + 6 * by)
            assert torch.equal(found[name], wanted)


@pytest.mark.parametrize("scales", [{1: 1e-15, 2: 1e-6}, {1: 1e12}])
def test_experts_of_any_size_are_coded(source: Path, tmp_path: Path, scales: dict[int, float]) -> None:
    """By what an error of theirs is worth where it is not measured: as much as another of the same size."""
    own = shutil.copytree(source, tmp_path / "source")
    for number, scale in scales.items():
        rewrite(own, lambda name, x, expert=f".experts.{number}.", by=scale: x * by if expert in name else x)
    report = compress(own, tmp_path / "out", ALONE)
    for part in report.coded:
        scaled = [part.expert_errors[expert] for expert in scales]
        others = [error for expert, error in enumerate(part.expert_errors) if expert not in scales]
        worth, less = (scaled, others) if scales[1] > 1 else (others, scaled)
        assert max(worth) < 0.2
        assert 2 * max(worth) < min(less) <= max(less) <= 1 + 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(source: Path, tmp_path: Path, value: float) -> None:
    own = shutil.copytree(source, tmp_path / "source")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(own, lambda other, tensor: tensor.index_fill(0, torch.tensor([1]), value) if other == name else tensor)
    with pytest.raises(CheckpointError, match=name):
        compress(own, tmp_path / "out", ALONE)


def test_weights_too_large_to_be_squared_are_refused(source: Path, tmp_path: Path) -> None:
    own = shutil.copytree(source, tmp_path / "source")
    rewrite(own, lambda name, tensor: tensor * 1e25 if "layers.1.mlp.experts.2.up_proj" in name else tensor)
    with pytest.raises(CheckpointError, match=r"layer 1 up has weights of \d\S*e\+2\d, too large to be coded"):
        compress(own, tmp_path / "out", ALONE)


def test_one_expert_is_enough(tmp_path: Path) -> None:
    write_source(tmp_path / "source", num_experts=1, num_experts_per_tok=1)
    report = compress(tmp_path / "source", tmp_path / "out", CompressConfig(bits=4))
    assert report.bits is not None
    assert 3.95 < report.bits <= 4


# what is told


def test_the_report_holds_the_errors_of_the_weights_as_stored(source: Path, coded: Path, dense: Path) -> None:
    report = Report.read(coded)
    assert Report.read(coded).to_json() == json.loads((coded / REPORT).read_text())
    assert [(part.layer, part.family) for part in report.coded] == [(n, f) for n in range(LAYERS) for f in FAMILIES]
    for part in report.coded:
        before, after = (experts(folder, part.layer, part.family) for folder in (source, dense))
        missed = (before - after).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        assert part.expert_errors == pytest.approx(missed.tolist(), rel=1e-4)
        assert part.error == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-4)
        assert part.original_parameters == E * P * D
        num_inputs = P if part.family == "down" else D
        assert sum(part.rows_by_width) == E * num_inputs
        bits = sum(width * count for width, count in enumerate(part.rows_by_width)) / 2
        assert sum(part.expert_widths) * num_inputs == pytest.approx(bits, rel=1e-3)
    assert sum(part.stored_bytes for part in report.coded) == bytes_of_experts(coded)
    assert report.bits == 8 * bytes_of_experts(coded) / WEIGHTS
    assert 16 * report.kept == pytest.approx(report.bits)
    assert set(report.family_errors()) == set(FAMILIES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "router"}, r"coded\[0\] is not of a layer and a family"),
        ({"layer": -1}, r"coded\[0\] is not of a layer and a family"),
        ({"rows_by_width": [1, 2]}, r"coded\[0\] is not of a layer and a family"),
        ({"expert_widths": []}, r"coded\[0\] is not of a layer and a family"),
        ({"stored_bytes": 0}, r"coded\[0\].stored_bytes is 0, which cannot be"),
        ({"original_parameters": -3}, r"coded\[0\].original_parameters is -3"),
        ({"seconds": -1.0}, r"-1\.0 seconds cannot be"),
        ({"error": "small"}, r"error is 'small'"),
    ],
)
def test_a_record_of_what_cannot_be_is_refused(
    coded: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = json.loads((coded / REPORT).read_text())
    content["coded"][0] |= change
    (tmp_path / REPORT).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        Report.read(tmp_path)


class Told(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, scopes: Sequence[Scope], num_finished: int) -> None:
        self.said.append(f"start {len(scopes)} {num_finished}")

    def coded(self, families: Sequence[CodedReport]) -> None:
        assert {part.layer for part in families} == {families[0].layer}
        self.said.append(f"coded {families[0].layer} {'+'.join(part.family for part in families)}")

    def scope(self, scope: Scope) -> None:
        self.said.append(f"scope {scope.layers}")

    def stop(self) -> None:
        self.said.append("stop")


def test_observers_are_told_of_every_layer(source: Path, tmp_path: Path) -> None:
    told = Told()
    compress(source, tmp_path / "out", dataclasses.replace(ALONE, families=("up", "down")), [told])
    layers = [word for layer in range(LAYERS) for word in (f"coded {layer} up+down", f"scope ({layer},)")]
    assert told.said == [f"start {LAYERS} 0", *layers, "stop"]


def test_the_page_shows_bits_and_errors(coded: Path) -> None:
    report, page = Report.read(coded), render(coded)
    for part in report.coded:
        assert f"{part.bits:.2f}" in page
        assert f"{part.error:.4f}" in page
    assert "Where the bits went" in page
    assert "coded experts" in page
    assert "widths and scales" in page
    assert "could show" not in page


def test_all_that_is_stored_of_experts_is_told_apart(coded: Path) -> None:
    after = {entry.kind: entry.after for entry in bytes_by_kind(open_checkpoint(coded))}
    assert after["coded experts"] + after["widths and scales"] == bytes_of_experts(coded)
    assert after[ROUTED] == 4  # the tripwire


# runs that were killed


class Killed(BaseException):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, num_layers: int) -> None:
    code, calls = coding.code_family, 0

    def code_or_die(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > num_layers * len(FAMILIES) + 1:
            raise Killed
        return code(*arguments)

    for module in (compensation, scope_module):
        monkeypatch.setattr(module, "code_family", code_or_die)


def assert_same_files(found: Path, expected: Path) -> None:
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.glob("*.safetensors"):
        assert (found / path.name).read_bytes() == path.read_bytes()
    for name in ("config.json", "model.safetensors.index.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (found, expected))
        assert ours == theirs


@pytest.mark.parametrize("layers", [None, 1])
def test_what_waits_on_disk_is_coded_to_the_same_bytes(
    source: Path, coded: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int | None
) -> None:
    config = CompressConfig(bits=3)
    monkeypatch.setattr(on_disk, "MOST_WEIGHTS", 1)
    assert inspect(source, config).waiting == 0
    for module in (outlook, outline):
        monkeypatch.setattr(module, "MOST_WEIGHTS", 1)
    assert inspect(source, config).waiting == 3 * 4 * E * P * D
    assert "and 196.61 kB for a while; " in str(next(islice(inspect(source, config).lines(), 1, None)))
    assert inspect(source, dataclasses.replace(config, calibrate="none")).waiting == 0
    with monkeypatch.context() as patch:
        patch.setattr("globe.checkpoint.writer._free", lambda _: inspect(source, config).written + 1000)
        with pytest.raises(OutputError, match=r"needs .*, .* are free"):
            compress(source, tmp_path / "full", config)
        patch.setattr("globe.checkpoint.writer._free", lambda _: inspect(source, config).read + 1000)
        with pytest.raises(OutputError, match=r"needs .*, .* are free"):
            export_dense(coded, tmp_path / "full dense")
    if layers is not None:
        with monkeypatch.context() as patch:
            kill_after(patch, layers)
            with pytest.raises(Killed):
                compress(source, tmp_path / "out", config)
    compress(source, tmp_path / "out", config)
    assert_same_files(tmp_path / "out", coded)
    monkeypatch.setattr(decoded_module, "_AT_ONCE", 3 * P * D)  # as many experts at once
    export_dense(coded, tmp_path / "dense")
    for path in dense.glob("*.safetensors"):
        assert (tmp_path / "dense" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("layers", [0, 1])
def test_a_killed_run_goes_on_to_the_same_bytes(
    source: Path, coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    config = CompressConfig(bits=3)
    with monkeypatch.context() as patch:
        kill_after(patch, layers)
        with pytest.raises(Killed):
            compress(source, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    told = Told()
    with monkeypatch.context() as patch:
        for name in ("calibrate", "sample_windows", "measured_sensitivities", "plan_coding"):
            patch.setattr(prepare_module, name, None)  # all of that is taken up
        compress(source, tmp_path / "out", config, [told])
    assert told.said[0] == f"start {LAYERS} {layers}"
    verify_files(tmp_path / "out")
    assert_same_files(tmp_path / "out", coded)


@pytest.mark.parametrize("calibrate", ["samples", "none", "text"])
def test_a_run_killed_planning_takes_up_what_was_measured(
    request: pytest.FixtureRequest, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrate: str
) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    own, config = source, CompressConfig(bits=3, calibrate=calibrate)
    if calibrate == "text":
        own, config = request.getfixturevalue("with_text")
    expected = request.getfixturevalue({"samples": "coded", "none": "measured_only", "text": "whole"}[calibrate])
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "plan_coding", die)
        with pytest.raises(Killed):
            compress(own, tmp_path / "out", config)
    with monkeypatch.context() as patch:
        for name in ("calibrate", "sample_windows", "measured_sensitivities"):
            patch.setattr(prepare_module, name, None)
        report = compress(own, tmp_path / "out", config)
    assert report.uniform_because is None
    assert_same_files(tmp_path / "out", expected)


def test_damaged_sensitivities_are_measured_again(
    source: Path, coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, 0)
        with pytest.raises(Killed):
            compress(source, tmp_path / "out", CompressConfig(bits=3))
    (file,) = (tmp_path / "out.partial").rglob("sensitivities.safetensors")
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    compress(source, tmp_path / "out", CompressConfig(bits=3))
    assert_same_files(tmp_path / "out", coded)


def test_a_finished_layer_that_is_damaged_is_coded_again(
    source: Path, coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            compress(source, tmp_path / "out", CompressConfig(bits=3))
    (file,) = (tmp_path / "out.partial").glob("model-00001-of-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-7] ^= 16
    file.write_bytes(content)
    compress(source, tmp_path / "out", CompressConfig(bits=3))
    assert_same_files(tmp_path / "out", coded)


def test_going_on_with_other_bits_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            compress(source, tmp_path / "out", ALONE)
    with pytest.raises(SettingsError, match=r"bits was 3(\.0)?, now 2(\.0)?"):
        compress(source, tmp_path / "out", dataclasses.replace(ALONE, bits=2))
