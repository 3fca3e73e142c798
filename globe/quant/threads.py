"""Threads for compiled functions that hold no lock, as many as torch uses."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks that do not depend on each other, at most `torch.get_num_threads()` at a time."""
    num_threads = min(torch.get_num_threads(), len(tasks))
    if num_threads < 2:
        for task in tasks:
            task()
    else:
        pool = _pool(num_threads)
        for running in [pool.submit(task) for task in tasks]:
            running.result()


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads)


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a fork
