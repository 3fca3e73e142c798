"""A server in a process of its own, and what it answers to clients at the same time."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def serving(command: Sequence[object], environment: Mapping[str, str], log: Path) -> Iterator[str]:
    """Run a command that is told its host and port behind what is given; yields the address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file, subprocess.Popen(told, env=environment, stdout=file, stderr=file) as server:
        try:
            while not _answers(port):
                assert server.poll() is None, log.read_text()[-4000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def complete(address: str, model: Path, prompts: Sequence[Any], num_tokens: int, **further: Any) -> list[str]:
    """Greedy continuations, each asked for by a client of its own, all at once."""

    def ask(prompt: Any) -> str:
        asked = {"model": str(model), "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, **further}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)["choices"][0]["text"]

    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(clients.map(ask, prompts))


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
            return response.status == 200
    except OSError:
        return False
