"""Code run where globe was never imported: each time in a fork of one process that knows transformers only."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SERVER = """
import json, os, sys, traceback
import torch
from transformers import AutoModelForCausalLM, pipeline
assert "globe" not in sys.modules
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(task[name], os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["-c", *task["arguments"]]
        status = 0
        try:
            exec(task["code"], {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


class FreshProcess:
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        home = str(Path(self._folder.name) / "hf")  # where transformers copies a checkpoint's code
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HOME": home},
        )

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.communicate()
        self._folder.cleanup()

    def run(self, code: str, *arguments: Path) -> Ended:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            files = {name: str(Path(folder) / name) for name in ("stdout", "stderr")}
            print(json.dumps({"code": code, "arguments": list(map(str, arguments)), **files}), file=self._server.stdin)
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            return Ended(status, *(Path(files[name]).read_text() for name in ("stdout", "stderr")))
