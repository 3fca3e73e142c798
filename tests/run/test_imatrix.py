"""What llama.cpp's quantiser is given, read as llama.cpp reads it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from globe import CompressConfig, OutputError, SettingsError, UnsupportedModelError
from globe.checkpoint.imatrix import IMATRIX, TENSOR_TYPES
from globe.checkpoint.manifest import verify_files
from globe.cli.main import main
from globe.errors import FinishedError
from globe.plan.ggml_types import types_for
from globe.run import prepare as prepare_module
from globe.run.calibration import keep_statistics
from globe.run.imatrix import plan_types, write_imatrix
from globe.run.job import make_job
from globe.run.observer import Observers
from globe.terms import FAMILIES
from tests.coded import LAYERS, D, E, P, write_source

FIVE = CompressConfig(bits=5.2)
SIDES = {"gate": (D, P), "up": (D, P), "down": (P, D)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix") / "source"
    write_source(folder)
    return folder


@pytest.fixture(scope="module")
def statistics(source: Path) -> Path:
    file, job = source.with_name("statistics.safetensors"), make_job(source, FIVE)
    keep_statistics(file, job, prepare_module.run_all(job, Observers(())))
    return file


def from_statistics(statistics: Path, bits: float = 5.2) -> CompressConfig:
    return CompressConfig(bits=bits, statistics=str(statistics))


def test_the_matrix_has_the_mean_squares_of_what_experts_multiply(
    source: Path, statistics: Path, tmp_path: Path
) -> None:
    write_imatrix(source, tmp_path / "out", from_statistics(statistics))
    reader = gguf.GGUFReader(tmp_path / "out" / IMATRIX)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert "general.architecture" not in reader.fields
    kept = load_file(statistics)
    chunks = [reader.fields[f"imatrix.chunk_{each}"].contents() for each in ("count", "size")]
    assert chunks == list(kept["windows"].shape)
    assert reader.fields["imatrix.datasets"].contents() == ["samples"]
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * 3 * LAYERS
    for layer in range(LAYERS):
        for family in FAMILIES:
            name, num_inputs = f"blk.{layer}.ffn_{family}_exps.weight", SIDES[family][0]
            sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
            assert (sums.shape, counts.shape) == ((E, num_inputs), (E, 1))
            assert np.array_equal(counts[:, 0], kept[f"{layer}.counts"].numpy())
            for expert in range(E):
                if family == "down":
                    expected = kept[f"{layer}.inner"][expert].diagonal() / kept[f"{layer}.counts"][expert]
                else:
                    expected = kept[f"{layer}.inputs"].diagonal()
                assert torch.from_numpy(sums[expert] / counts[expert]).allclose(expected, rtol=1e-5)


def test_the_types_keep_the_budget_and_lose_less_than_one_type_for_all(
    source: Path, statistics: Path, tmp_path: Path
) -> None:
    plan = write_imatrix(source, tmp_path / "out", from_statistics(statistics))
    assert plan.bits <= 5.2
    lines = (tmp_path / "out" / TENSOR_TYPES).read_text().split()
    assert dict(line.replace("[.]", ".").split("=") for line in lines) == plan.types
    sizes = {each.name.lower(): gguf.GGML_QUANT_SIZES[each] for each in gguf.GGMLQuantizationType}
    stored = [8 * sizes[each][1] / sizes[each][0] for each in plan.types.values()]  # all tensors have as many weights
    assert plan.bits == pytest.approx(sum(stored) / len(stored))
    kept = load_file(statistics)
    total = sum(float(each.sum()) for name, each in kept.items() if name.startswith("sensitivities."))
    (alike,) = [each for each in types_for(D) if each.name == "q4_1"]  # 5 bits, the most that all could have
    assert 0 < plan.predicted_kl < total * alike.noise


def test_bits_go_where_errors_cost_most(source: Path) -> None:
    job = make_job(source, FIVE)
    cost = {(layer, family): 100.0 if family == "down" else 1.0 for layer in range(LAYERS) for family in FAMILIES}
    sensitivities = {key: torch.full((E, SIDES[key[1]][1]), each) for key, each in cost.items()}
    types = plan_types(job, sensitivities).types
    assert {types[f"blk.{layer}.ffn_down_exps.weight"] for layer in range(LAYERS)} == {"q5_1"}
    assert {types[f"blk.{layer}.ffn_up_exps.weight"] for layer in range(LAYERS)} <= {"iq4_nl", "q5_0"}


def test_the_output_is_whole_and_made_once(
    source: Path, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_imatrix(source, tmp_path / "out", from_statistics(statistics))
    assert verify_files(tmp_path / "out").num_files == 2
    with pytest.raises(FinishedError):
        write_imatrix(source, tmp_path / "out", from_statistics(statistics))
    with pytest.raises(OutputError, match="not empty"):
        write_imatrix(source, tmp_path / "out", from_statistics(statistics, 6))
    write_imatrix(source, tmp_path / "out", from_statistics(statistics, 6), overwrite=True)
    monkeypatch.setattr("globe.run.imatrix.save_tensor_types", None)
    with pytest.raises(TypeError):
        write_imatrix(source, tmp_path / "more", from_statistics(statistics))
    assert not (tmp_path / "more").exists()


def test_the_command_tells_what_to_run(
    source: Path, statistics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["imatrix", str(source), "-o", str(out), "--bits", "5.2", "--statistics", str(statistics)]) == 0
    said = capsys.readouterr().out
    assert f"llama-quantize --imatrix {out}/imatrix.gguf --tensor-type-file {out}/tensor_types.txt" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4.0}, r"bits 4 is out of reach: llama.cpp's smallest types take 4\.50 here"),
        ({"calibrate": "none"}, "what running the model says: that is asked for"),
        ({"bits": None, "keep": 0.5}, "leave out keep"),
        ({"families": ("down",)}, "leave out keep, ratios, format, families"),
    ],
)
def test_what_it_cannot_do_is_said(source: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        write_imatrix(source, tmp_path / "out", dataclasses.replace(FIVE, **changes))


def test_experts_that_llama_cpp_does_not_round_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="layer 0 have 48 inputs of down"):
        write_imatrix("shipped", tmp_path / "out", FIVE)


def test_without_gguf_it_says_what_to_install(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SettingsError, match="pip install gguf"):
        write_imatrix(source, tmp_path / "out", FIVE)
