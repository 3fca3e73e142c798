from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from globe import CompressConfig, FitConfig, SettingsError, compress, fit_bank
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.shipped import MODEL
from globe.errors import OutOfMemoryError
from globe.machine import memory
from globe.machine.device import _has_driver, usable_device
from globe.machine.memory import explained_exhaustion, total_memory
from globe.measure.evaluate import evaluate
from globe.measure.runnable import Place, bytes_at_once, find_place, has_room
from globe.measure.settings import EvaluateConfig
from globe.sweeps.settings import SweepConfig
from globe.sweeps.sweep import sweep

GB = 10**9
WEIGHTS = sum(tensor.nbytes for tensor in open_checkpoint(MODEL).tensors.values())
AT_ONCE = bytes_at_once(open_checkpoint(MODEL))


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`groups(membership, {file: content})`: the control groups of a process."""

    def write(membership: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(membership)
        for name, content in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(content)

    monkeypatch.setattr(memory, "_PROC", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "fs")
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 8 * 10**6}.__getitem__)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return write


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("", {}, 8 * GB),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "memory.max": "max\n"}, 8 * GB),
        ("0::/a/b\n", {"a/b/memory.max": f"{3 * GB}\n"}, 3 * GB),
        ("0::/a/b\n", {"a/b/memory.max": f"{3 * GB}\n", "a/memory.max": f"{2 * GB}\n"}, 2 * GB),
        ("0::/docker/deadbeef\n", {"memory.max": f"{GB}\n"}, GB),  # the path is the host's
        ("1:cpu:/x\n0::/\n", {"memory.max": f"{GB}"}, GB),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": f"{GB}\n"}, GB),
        ("4:cpu,memory:/a/b\n", {"memory/memory.limit_in_bytes": f"{2 * GB}\n"}, 2 * GB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8 * GB),
        ("0::/a\n", {"unified/a/memory.max": f"{GB}\n"}, GB),
        ("0::/a\n", {"a/memory.max": "nonsense\n"}, 8 * GB),
    ],
)
def test_memory_is_the_container_s(
    groups: Callable[..., None], membership: str, files: dict[str, str], expected: int
) -> None:
    groups(membership, files)
    found, bound = total_memory()
    assert found == expected
    assert ("container" in bound) == (expected < 8 * GB)


@pytest.mark.parametrize(("kind", "option"), [(resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")])
def test_memory_is_bounded_by_the_process_s_own_limits(
    groups: Callable[..., None], monkeypatch: pytest.MonkeyPatch, kind: int, option: str
) -> None:
    groups("0::/\n", {"memory.max": f"{4 * GB}"})
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (GB if asked == kind else resource.RLIM_INFINITY, 0))
    assert total_memory() == (GB, f"this process may use 1.00 GB (ulimit {option})")


@pytest.mark.parametrize(
    ("vram", "ram", "itemsize", "place"),
    [
        (3 * WEIGHTS, WEIGHTS, None, "cuda"),
        (3 * WEIGHTS, 5 * WEIGHTS, 4, "cpu"),
        (WEIGHTS, 3 * WEIGHTS, None, "cpu"),
        (WEIGHTS, WEIGHTS, None, "cuda a layer at a time"),
        (AT_ONCE, WEIGHTS, None, "cpu a layer at a time"),
        (AT_ONCE, AT_ONCE, None, "nowhere"),
    ],
)
def test_a_model_runs_where_it_fits(
    groups: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    vram: int,
    ram: int,
    itemsize: int | None,
    place: str,
) -> None:
    groups("0::/\n", {"memory.max": f"{ram}"})
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (vram, 100 * GB))
    found = find_place(open_checkpoint(MODEL), "cuda", itemsize)
    assert f"{found.device or 'nowhere'}{' a layer at a time' if found.is_streamed else ''}" == place
    assert (found.obstacle is None) == (place == "cuda")
    if found.obstacle is not None:
        assert "over 50% of what there is: cuda has" in found.obstacle
        assert ("container" in found.obstacle) == (place != "cpu")
        assert ("a layer at a time it takes" in found.obstacle) == (place == "nowhere")


@pytest.mark.parametrize(
    ("place", "processes", "expected"),
    [
        (Place("cpu", None), 1, False),
        (Place(None, "too small"), 1, False),
        (Place("cpu", "too small", is_streamed=True), 3, True),
        (Place("cpu", "too small", is_streamed=True), 4, False),
        (Place("cuda", "too small", is_streamed=True), 4, True),
    ],
)
def test_so_many_processes_run_a_layer_at_a_time_as_memory_has_room_for(
    groups: Callable[..., None], monkeypatch: pytest.MonkeyPatch, place: Place, processes: int, expected: bool
) -> None:
    """On a GPU each has its own."""
    at_once = bytes_at_once(checkpoint := open_checkpoint(MODEL))
    groups("0::/\n", {"memory.max": f"{int(3.5 * at_once / 0.8)}"})
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (2 * at_once, 100 * GB))
    assert has_room(checkpoint, place, processes) == expected


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_every_way_to_say_that_memory_ran_out(error: Exception) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"while fitting .*: take less"),
        explained_exhaustion("fitting", "take less"),
    ):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("out of memory"), OSError(2, "No such file")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as found, explained_exhaustion("fitting", "take less"):
        raise error
    assert found.value is error


def test_exhaustion_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeModel.forward", exhausted)
        with pytest.raises(OutOfMemoryError, match="smaller --batch"):
            evaluate("shipped", EvaluateConfig(max_tokens=8, length=8))
    monkeypatch.setattr("globe.run.scope.fit_bank", exhausted)  # its name is the function in globe
    settings = CompressConfig(keep=0.75, layers=(1,), steps=1, calibrate="none", allocation="uniform")
    with pytest.raises(OutOfMemoryError, match=r"fitting scope 1 on cpu .*--scope"):
        compress("shipped", tmp_path / "out", settings)


def test_auto_is_the_gpu_where_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_device("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("globe.machine.device._fault", lambda _: None)
    monkeypatch.setattr("globe.machine.device._has_driver", lambda: False)
    assert usable_device("auto") == "cpu"
    monkeypatch.setattr("globe.machine.device._has_driver", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert usable_device("auto") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert usable_device("auto") == "cuda"
    monkeypatch.setattr("globe.machine.device._fault", lambda _: "the driver is too old")
    assert usable_device("auto") == "cpu"
    with pytest.raises(SettingsError, match="the driver is too old"):
        usable_device("cuda")


def test_a_driver_is_looked_for_as_torch_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("globe.machine.device._DRIVER_AMD", tmp_path / "kfd")
    monkeypatch.setattr("globe.machine.device._DRIVER_NVIDIA", "libnowhere.so.1")
    assert not _has_driver()
    (tmp_path / "kfd").touch()
    assert _has_driver()
    monkeypatch.setattr("globe.machine.device._DRIVER_AMD", tmp_path / "nowhere")
    monkeypatch.setattr("globe.machine.device._DRIVER_NVIDIA", None)  # the process itself
    assert _has_driver()


@pytest.mark.parametrize("device", ["gpu", "meta", "", "nowhere:0"])
def test_what_is_no_device_is_no_setting(device: str) -> None:
    for settings in (CompressConfig, EvaluateConfig):
        with pytest.raises(SettingsError, match="is unknown; choose auto, cpu, cuda, cuda:1 or mps"):
            settings(device=device)


def test_a_device_is_checked_when_work_begins(tmp_path: Path) -> None:
    device = "cuda:99"
    CompressConfig(keep=0.75, device=device), EvaluateConfig(device=device)  # settings can be made anywhere
    with pytest.raises(SettingsError, match="choose cpu, cuda or mps"):
        fit_bank(torch.randn(2, 4, 4), FitConfig(rank=1, num_bases=1, device=device))
    with pytest.raises(SettingsError, match="choose cpu, cuda or mps"):
        compress("shipped", tmp_path / "out", CompressConfig(keep=0.75, device=device))
    assert not list(tmp_path.iterdir())
    with pytest.raises(SettingsError, match="choose cpu, cuda or mps"):
        evaluate("shipped", EvaluateConfig(device=device))


def test_a_record_has_the_device_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CompressConfig(keep=0.75, layers=(1,), steps=1, calibrate="none", allocation="uniform")
    assert settings.device == "auto"
    assert compress("shipped", tmp_path / "out", settings).config["device"] == "cpu"
    common, judged = dataclasses.replace(settings, layers=None), EvaluateConfig(max_tokens=8, length=8)
    config = SweepConfig(keep=(0.7,), layers=("1",), common=common, evaluate=judged)
    first = sweep("shipped", tmp_path / "sweep", config)
    assert (first.config.common.device, first.config.evaluate.device) == ("cpu", "cpu")
    monkeypatch.setattr("globe.sweeps.sweep.usable_device", lambda _: "cuda")
    with pytest.raises(SettingsError, match="device was 'cpu', now 'cuda'"):
        sweep("shipped", tmp_path / "sweep", config)
