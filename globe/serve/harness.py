"""lm-eval's own command line, in a process that knows the native format."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import globe.model.register  # noqa: F401  (registers the native format)
from globe.errors import SettingsError


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Hand `arguments` to lm-eval as `lm-eval` itself would get them; it ends the process in its own ways.

    Raises `SettingsError` if lm-eval is not installed.
    """
    try:
        command = importlib.import_module("lm_eval.__main__")
    except ImportError as error:
        raise SettingsError(
            f"globe lm-eval runs the package lm-eval, which cannot be imported ({error}): pip install 'lm-eval[hf]'"
        ) from error
    given = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        command.cli_evaluate()
    finally:
        sys.argv = given
