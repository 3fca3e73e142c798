from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator

import pytest
import torch

from globe.quant import threads
from globe.quant.threads import run_all, run_by_all


@pytest.fixture(params=["torch's", "a pool's"], autouse=True)
def _four_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "a pool's":
        monkeypatch.setattr(threads, "_parallel", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_every_task_is_run_once() -> None:
    done: list[int] = []
    run_all([functools.partial(done.append, i) for i in range(100)])
    assert sorted(done) == list(range(100))


def test_four_run_at_a_time() -> None:
    together = threading.Barrier(4, timeout=60)
    run_all([together.wait] * 8)  # pyright: ignore[reportArgumentType]


def test_tasks_may_have_tasks_of_their_own() -> None:
    done: list[int] = []
    run_all([functools.partial(run_all, [functools.partial(done.append, i)] * 3) for i in range(20)])
    assert sorted(done) == sorted([*range(20)] * 3)


def test_what_a_task_raises_is_raised() -> None:
    def fail() -> None:
        raise KeyError("x")

    done: list[int] = []
    with pytest.raises(KeyError, match="x"):
        run_all([functools.partial(done.append, 1), fail, functools.partial(done.append, 2)])
    run_all([functools.partial(done.append, 3)] * 2)
    assert done[-2:] == [3, 3]


def test_a_worker_is_called_by_all_with_its_job() -> None:
    seen: list[int | None] = []
    worker = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(seen.append)
    address = ctypes.cast(worker, ctypes.c_void_p).value
    assert address is not None
    run_by_all(address, 12345)
    torch.set_num_threads(1)
    run_by_all(address, 6)
    assert seen == [12345] * 4 + [6]
