"""The OpenAI-compatible server that is installed, started on a checkpoint: vLLM's, else the one of transformers."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from globe.checkpoint.quantized import QUANT_METHOD
from globe.checkpoint.reader import open_checkpoint
from globe.errors import SettingsError
from globe.model.quantization_config import read_section

_VLLM = ("-m", "vllm.entrypoints.openai.api_server")  # what `vllm serve` runs, which some of its packages lack
_TRANSFORMERS = ("-c", "import globe; from transformers.cli.transformers import main; main()")


@dataclasses.dataclass(frozen=True)
class Server:
    """A server, and how it is started on one checkpoint."""

    name: str
    """With its version."""
    command: tuple[str, ...]
    """The command line."""
    passed_over: str | None = None
    """Why it is not vLLM, where that is installed."""

    def run(self) -> NoReturn:
        """Become the server: the process goes on as its command."""
        os.execv(self.command[0], self.command)


def find_server(folder: Path, arguments: Sequence[str] = ()) -> Server:
    """vLLM, if it is installed and can serve this checkpoint here, else transformers' server.

    folder: of a compressed model, or of a dense one such as `export_dense` writes; `arguments` go to the server as they
    are. Requests name the folder, as it is given here, as their model. Raises `CheckpointError` if the folder holds no
    checkpoint that can be read, `SettingsError` if no server is installed.
    """
    checkpoint = open_checkpoint(folder.absolute())
    is_native = (checkpoint.config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD
    if is_native:
        read_section(checkpoint)
    reason = None
    if importlib.util.find_spec("vllm") is not None:
        try:
            settings = _vllm_settings(is_native)
        except (ImportError, SettingsError) as error:
            reason = f"vLLM is installed but cannot serve this model here: {error}"
        else:
            command = (sys.executable, *_VLLM, "--model", str(folder), *settings, *arguments)
            return Server(f"vLLM {importlib.import_module('vllm').__version__}", command)
    from transformers.utils import import_utils

    if not import_utils.is_serve_available():
        raise SettingsError(
            f"globe serve starts vLLM or `transformers serve`. {reason or 'vLLM is not installed'}, and for the other "
            "fastapi, uvicorn, openai or pydantic is missing: pip install 'transformers[serving]'"
        )
    command = (sys.executable, *_TRANSFORMERS, "serve", str(folder), *arguments)
    return Server(f"transformers {importlib.metadata.version('transformers')}", command, reason)


def _vllm_settings(is_native: bool) -> tuple[str, ...]:
    """What vLLM must be told; `ImportError` if its version, `SettingsError` if its platform cannot serve."""
    platform = importlib.import_module("vllm.platforms").current_platform
    if platform.is_unspecified():
        raise SettingsError("it finds no device that it was built for")
    if not is_native:
        return ()
    importlib.import_module("globe.serve.vllm_plugin")
    whole = "--enable-expert-parallel"  # of no effect in one process
    return (whole,) if platform.is_cpu() else (whole, "--enforce-eager")
