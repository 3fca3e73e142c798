#!/usr/bin/env python
"""The single-layer fit of test_qwen_training.py with both solvers, one after the other.

./test_single_layer.py
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro
from rich.console import Console

from globe.errors import GlobeError
from test_qwen_training import Training, train


def main(settings: Training) -> int:
    console = Console(highlight=False, soft_wrap=True)
    settings = dataclasses.replace(settings, use_single_layer=True)
    try:
        for solver, steps in (("am", settings.steps), ("varpro", 10 * settings.steps)):
            picture = Path(settings.picture).with_stem(f"{Path(settings.picture).stem}_{solver}")
            train(dataclasses.replace(settings, solver=solver, steps=steps, picture=picture), console)
            console.print()
    except GlobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Training)))
