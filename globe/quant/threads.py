"""Work for torch's own threads, by functions that hold no lock.

Where torch has OpenMP, its threads do the work: they spin for a while after a product, and others would have to share
the cores with them, and be woken each time besides.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_here = threading.local()
"""Whether this thread is at work for `run_all` already."""


def split(length: int, count: int) -> list[slice]:
    """So many parts of nearly the same length each, or fewer, of one each."""
    count = max(1, min(length, count))
    return [slice(*ends) for ends in itertools.pairwise(length * place // count for place in range(count + 1))]


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks that do not depend on each other, at most `torch.get_num_threads()` at a time. What they do runs on one
    thread each."""
    if torch.get_num_threads() < 2 or len(tasks) < 2 or getattr(_here, "is_working", False):
        for task in tasks:
            task()
        return
    waiting, failed = iter(tasks), list[BaseException]()

    def work(_: int | None) -> None:
        _here.is_working = True
        try:
            for task in waiting:
                task()
                if failed:
                    return
        except BaseException as error:  # it is raised below
            failed.append(error)
        finally:
            _here.is_working = False

    _run_by_all(_WORKER(work), None)
    if failed:
        raise failed[0]


def run_by_all(worker: int, job: int) -> None:
    """Have all threads at once call the C function at an address with one argument, an address."""
    _run_by_all(_WORKER(worker), ctypes.c_void_p(job))


def _run_by_all(worker: Any, job: ctypes.c_void_p | None) -> None:
    num_threads, parallel = torch.get_num_threads(), _parallel()
    if num_threads < 2:
        worker(job)
    elif parallel is not None:
        parallel(worker, job, num_threads, 0)
    else:
        for running in [_pool(num_threads).submit(worker, job) for _ in range(num_threads)]:
            running.result()


@functools.cache
def _parallel() -> Any:
    """What compilers turn a parallel region into, of the OpenMP that torch has loaded: GNU's, in the place of which
    LLVM's and Intel's have it too on Linux; None elsewhere."""
    return getattr(ctypes.CDLL(None), "GOMP_parallel", None)


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads)


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a fork
