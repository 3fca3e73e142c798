"""A command in several processes that find each other as those of torchrun do: forks, which start at once."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from globe.cli.main import main


def run_in_ranks(
    size: int, arguments: Sequence[str], said: Path, before: Callable[[int], None] = lambda _: None
) -> list[int]:
    """The exit statuses, by rank, negative ones of signals; what a rank says is in the file of its number in the folder
    `said`. `before` is called first, in each process, with its rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said.mkdir()
    children = [_start(rank, size, port, arguments, said / str(rank), before) for rank in range(size)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _start(rank: int, size: int, port: int, arguments: Sequence[str], said: Path, before: Callable[[int], None]) -> int:
    if (child := os.fork()) > 0:
        return child
    status = 70
    try:
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.stdout = sys.stderr = said.open("w")
        before(rank)
        status = main(arguments)
        sys.stdout.flush()
    finally:
        os._exit(status)
