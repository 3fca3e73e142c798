from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from globe import (
    CheckpointError,
    CompressConfig,
    GlobeError,
    OutputError,
    SettingsError,
    UnsupportedModelError,
    compress,
)
from globe.checkpoint import layout, writer
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import Report
from globe.model.names import is_factor
from globe.plan.scopes import BankPlan
from globe.run import compress as compress_module
from globe.run import scope as scope_module
from globe.run.export import export_dense
from globe.run.observer import Observers
from globe.train.result import StepRecord
from tests.model.compressed import LAYERS
from tests.tiny_sources import write_source

QUICK = CompressConfig(keep=0.8, steps=5, calibrate="none", allocation="uniform")
MEASURED = CompressConfig(keep=0.8, steps=5)
LAYOUTS = ("per_expert", "fused")
IDS = torch.tensor([[3, 5, 7, 11, 13, 17, 19, 23]])


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    write_source(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bank_that_compresses_nothing_away_leaves_the_logits(tmp_path: Path, layout: str) -> None:
    """Of a model that is run, too; the conformance suite has all families."""
    model = write_source(tmp_path / "source", layout=layout)
    config = CompressConfig(rank_ratio=1, basis_ratio=1, activation="identity", steps=5)
    report = compress(tmp_path / "source", tmp_path / "out", config)
    assert report.error < 1e-4
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings",
    [
        {"families": ("up",)},
        {"families": ("gate", "down")},
        {"families": ("down",)},
        {"share_families": False},
        {"scope": "model"},
        {"scope": "2"},
        {"layers": (1,)},
        {"scope": "model", "max_experts": 36},
        {"scope": "model", "stream": True},
        {"scope": "2", "stream": True, "share_families": False, "families": ("up", "down")},
        {"codes": "entmax15", "support": 3},
        {"solver": "am", "activation": "silu"},
        {"factor_dtype": "bfloat16"},
        {"factor_dtype": "float16", "scope": "model"},
    ],
)
def test_every_choice_of_scope_and_families_loads_as_it_exports(
    tmp_path: Path, layout: str, settings: dict[str, Any]
) -> None:
    write_source(tmp_path / "source", layout=layout)
    config = CompressConfig(keep=0.7, steps=3, **settings)
    if layout == "fused":  # what is measured does not depend on it
        config = dataclasses.replace(config, calibrate="none", allocation="uniform")
    report = compress(tmp_path / "source", tmp_path / "out", config)
    assert 0 < report.error < 1
    assert 0.5 < report.kept <= 0.7
    export_dense(tmp_path / "out", tmp_path / "dense")
    tolerance = 1e-4 if config.factor_dtype in ("bfloat16", "float16") else 1e-5
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "dense"), rtol=0, atol=tolerance)

    source, output = open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "out")
    dense = open_checkpoint(tmp_path / "dense")
    untouched = [name for name in source.tensors if ".experts." not in name]
    assert untouched
    for name in untouched:
        assert torch.equal(output.read(name), source.read(name))
        assert torch.equal(dense.read(name), source.read(name))
    if config.layers is not None:
        kept = [name for name in source.tensors if ".experts" in name and "layers.1." not in name]
        assert all(torch.equal(dense.read(name), source.read(name)) for name in kept)


def test_families_left_out_come_back_bit_for_bit(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", CompressConfig(keep=0.6, steps=2, families=("up",)))
    export_dense(tmp_path / "out", tmp_path / "dense")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "dense")
    for name in before.tensors:
        assert torch.equal(before.read(name), after.read(name)) == ("up_proj" not in name or "shared" in name), name


def test_a_copy_without_tied_weights_is_not_exported(tmp_path: Path) -> None:
    compress("shipped", tmp_path / "out", CompressConfig(keep=0.75, steps=1, layers=(1,), calibrate="none"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "copy")
    shutil.copy(tmp_path / "out" / "globe_source.json", tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"lacks lm_head.weight, which its source had"):
        export_dense(tmp_path / "copy", tmp_path / "dense")
    assert not list(tmp_path.glob("dense*"))


def test_the_report_holds_the_errors_of_the_weights_as_stored(source: Path, tmp_path: Path) -> None:
    report = compress(source, tmp_path / "out", CompressConfig(keep=0.7, steps=3, scope="2"))
    assert Report.read(tmp_path / "out") == report
    export_dense(tmp_path / "out", tmp_path / "dense")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "dense")
    for bank in report.banks:
        for layer, families in bank.expert_errors.items():
            for family, errors in families.items():
                names = [f"model.layers.{layer}.mlp.experts.{expert}.{family}_proj.weight" for expert in range(6)]
                w = torch.stack([before.read(name).double() for name in names])
                missed = w - torch.stack([after.read(name).double() for name in names])
                expected = missed.flatten(1).norm(dim=1) / w.flatten(1).norm(dim=1)
                assert errors == pytest.approx(expected.tolist(), rel=1e-4)
                assert bank.errors[layer][family] == pytest.approx(float(missed.norm() / w.norm()), rel=1e-4)
    assert sum(len(families) for bank in report.banks for families in bank.errors.values()) == LAYERS * 3
    sizes = [tensor.nbytes for tensor in open_checkpoint(tmp_path / "out").tensors.values()]
    assert report.compressed_bytes == sum(sizes)
    assert report.original_bytes == sum(tensor.nbytes for tensor in before.tensors.values())
    stored = [tensor.nbytes for tensor in open_checkpoint(tmp_path / "out").tensors.values() if is_factor(tensor.name)]
    assert 4 * sum(bank.shape.parameters for bank in report.banks) == sum(stored)  # float32: every code counts


def test_the_same_seed_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        compress(source, tmp_path / name, MEASURED)
    for shard in open_checkpoint(tmp_path / "one").shards:
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()


class InjectedError(Exception):
    pass


def fail_after(monkeypatch: pytest.MonkeyPatch, num_banks: int, fault: BaseException) -> None:
    calls, fit = 0, scope_module.fit_bank

    def fit_or_fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > num_banks:
            raise fault
        return fit(*args, **kwargs)

    monkeypatch.setattr(scope_module, "fit_bank", fit_or_fail)


@pytest.mark.parametrize("fault", [InjectedError(), KeyboardInterrupt()])
def test_a_killed_run_goes_on_after_its_last_finished_scope(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    compress(source, tmp_path / "whole", MEASURED)
    with monkeypatch.context() as patch:
        fail_after(patch, 2, fault)
        with pytest.raises(type(fault)):
            compress(source, tmp_path / "out", MEASURED)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):  # nothing half-written is loadable
        open_checkpoint(tmp_path / "out.partial")
    with monkeypatch.context() as patch:
        fail_after(patch, 1, InjectedError())  # one scope is left, so one fit is enough
        compress(source, tmp_path / "out", MEASURED)
    assert not (tmp_path / "out.partial").exists()
    for shard in open_checkpoint(tmp_path / "whole").shards:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "whole" / shard).read_bytes()


def test_going_on_with_other_settings_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_after(patch, 1, InjectedError())
        with pytest.raises(InjectedError):
            compress(source, tmp_path / "out", QUICK)
    with pytest.raises(SettingsError, match=r"steps was 5, now 6"):
        compress(source, tmp_path / "out", dataclasses.replace(QUICK, steps=6))
    changed = load_file(next(source.glob("*.safetensors")))
    save_file({k: v + 1 for k, v in changed.items()}, next(source.glob("*.safetensors")), metadata={"format": "pt"})
    with pytest.raises(SettingsError, match="fingerprint"):
        compress(source, tmp_path / "out", QUICK)


def test_a_finished_output_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", QUICK)
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(OutputError, match="exists"):
        compress(source, tmp_path / "out", QUICK)
    assert (tmp_path / "out" / "config.json").read_bytes() == before


def test_a_full_disk_leaves_nothing_loadable_and_can_be_gone_on_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = scope_module.save_tensors, 0

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OutputError(errno.ENOSPC, "the disk is full")
        real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(scope_module, "save_tensors", full)
        with pytest.raises(OutputError, match="disk is full"):
            compress(source, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()
    compress(source, tmp_path / "out", QUICK)
    assert logits(tmp_path / "out").isfinite().all()


def test_too_little_space_is_said_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    fail_after(monkeypatch, 0, InjectedError())
    with pytest.raises(OutputError, match="free"):
        compress(source, tmp_path / "out", QUICK)


def test_a_nan_in_a_weight_is_named(source: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    checkpoint = open_checkpoint(source)
    shard = source / checkpoint.tensors[name].shard
    tensors = load_file(shard)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        compress(source, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (7,)}, "layers 7 hold no routed experts"),
        ({"keep": 0.001}, r"keep 0.001 is out of reach .* choose from 0\.\d+ to below 1"),
        ({"keep": 1.5}, "above 0 and below 1"),
        ({"max_experts": 5}, "raise it to at least 18"),
        ({"stream": True, "solver": "am"}, "streamed with the solver varpro"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_any_work(
    source: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        compress(source, tmp_path / "out", CompressConfig(**{"keep": 0.7, **settings}))
    assert not (tmp_path / "out.partial").exists()


def test_what_is_not_a_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"model.layers.0.mlp.gate_proj.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="llama"):
        compress(folder, tmp_path / "out", QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_intermediate_size": 7}, "holds 6 experts of 8 x 16; config.json describes 6 of 7 x 16"),
        ({"mlp_only_layers": [1]}, r"layers \[1\] have experts in the files but not in the model"),
    ],
)
def test_files_and_configuration_must_agree(
    source: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        compress(source, tmp_path / "out", QUICK)


def test_a_fused_order_that_the_files_cannot_tell_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "source", layout="fused")
    monkeypatch.setitem(layout._TRAITS, "qwen2_moe", layout._Traits(interleaved=True))
    with pytest.raises(UnsupportedModelError, match="Qwen2MoeExperts is not supported: in which order"):
        compress(tmp_path / "source", tmp_path / "out", QUICK)


def test_a_quantised_source_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedModelError, match="fp8"):
        compress(source, tmp_path / "out", QUICK)


def test_remote_code_is_never_run(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "code.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(UnsupportedModelError, match="unheard_of"):
        compress(source, tmp_path / "out", QUICK)


def test_a_compressed_model_is_not_compressed_again(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", QUICK)
    with pytest.raises(GlobeError, match="already compressed"):
        compress(tmp_path / "out", tmp_path / "again", QUICK)


def test_one_shard_with_an_index_comes_back_as_it_was(source: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for shard in source.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    only = "model-00001-of-00001.safetensors"
    save_file(tensors, source / only, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, only)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    compress(source, tmp_path / "out", QUICK)
    export_dense(tmp_path / "out", tmp_path / "dense")
    assert open_checkpoint(tmp_path / "dense").shards == (only,)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "dense"), rtol=0, atol=1e-5)


def test_an_export_never_writes_outside_its_folder(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", QUICK)
    record = tmp_path / "out" / "globe_source.json"
    shards = json.loads(record.read_text())["shards"]
    first = next(iter(shards))
    record.write_text(json.dumps({"shards": {"../outside.safetensors": shards.pop(first), **shards}}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        export_dense(tmp_path / "out", tmp_path / "dense")
    assert not list(tmp_path.glob("outside*"))


def test_going_on_needs_room_only_for_what_is_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(compress_module, "require_space", lambda _, nbytes: asked.append(nbytes))
    with monkeypatch.context() as patch:
        fail_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "out", QUICK)
    compress(source, tmp_path / "out", QUICK)
    assert 0 < asked[1] < asked[0]


def test_exporting_a_dense_model_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not compressed"):
        export_dense(source, tmp_path / "dense")


def test_bfloat16_experts_are_those_of_the_dense_export_bit_for_bit(tmp_path: Path) -> None:
    write_source(tmp_path / "source", dtype=torch.bfloat16)
    compress(tmp_path / "source", tmp_path / "out", QUICK)
    export_dense(tmp_path / "out", tmp_path / "dense")
    ours, dense = logits(tmp_path / "out", torch.bfloat16), logits(tmp_path / "dense", torch.bfloat16)
    assert torch.equal(ours, dense)


def test_a_killed_stream_goes_on_within_its_scope(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last saved pass, not at the beginning, and to the same bytes."""
    config = CompressConfig(keep=0.7, steps=6, scope="model", stream=True)
    compress(source, tmp_path / "whole", config)
    monkeypatch.setattr("globe.experts.streamed.SAVE_SECONDS", 0.0)
    seen: list[int] = []

    class Watch(Observers):
        def step(self, bank: BankPlan, record: StepRecord) -> None:  # noqa: ARG002
            seen.append(record.step)
            if record.step == 4 and seen.count(4) == 1:
                raise InjectedError

    with pytest.raises(InjectedError):
        compress(source, tmp_path / "out", config, [Watch(())])
    compress(source, tmp_path / "out", config, [Watch(())])
    assert seen == [0, 1, 2, 3, 4, 4, 5, 6]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    for shard in open_checkpoint(tmp_path / "whole").shards:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "whole" / shard).read_bytes()


def test_a_stream_fits_as_well_as_a_fit_in_memory(source: Path, tmp_path: Path) -> None:
    settings = CompressConfig(keep=0.8, scope="model", steps=60)
    whole = compress(source, tmp_path / "whole", settings)
    streamed = compress(source, tmp_path / "streamed", dataclasses.replace(settings, stream=True))
    assert streamed.error < 1.05 * whole.error
    assert streamed.compressed_bytes == whole.compressed_bytes


def test_experts_of_several_dtypes_keep_them_in_a_dense_export(source: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            save_file({**tensors, name: tensors[name].bfloat16()}, shard, metadata={"format": "pt"})
    report = compress(source, tmp_path / "out", QUICK)
    (note,) = report.notes
    assert "1 layers have experts in BF16 and F32, layer 0 first; they are read as F32" in note
    export_dense(tmp_path / "out", tmp_path / "dense")
    before, after = open_checkpoint(source).tensors, open_checkpoint(tmp_path / "dense").tensors
    assert {key: tensor.dtype for key, tensor in after.items()} == {key: tensor.dtype for key, tensor in before.items()}
    assert after[name].dtype == "BF16"
