"""The settings that the rivals' papers leave open, chosen on the calibration split: never on what is reported.

    python -m benchmarks.rival_settings

The rivals see the first half of the split and are judged by their divergence on windows spread over the second.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from transformers.utils import logging

from benchmarks.quality import CALIBRATED, CALIBRATION, Evaluator
from benchmarks.record import RESULTS, write_record
from benchmarks.rivals.gptq import gptq
from benchmarks.stacks import read_stacks
from benchmarks.tables import Column, print_table
from globe.checkpoint.shipped import resolve_model

COLUMNS = (
    Column("setting", "setting"),
    Column("value", "value", "g"),
    Column("method", "method"),
    Column("kl", "KL", ".5f"),
)


@dataclasses.dataclass(frozen=True)
class RivalSettingsConfig:
    """What is tried."""

    model: str = "shipped"
    """`shipped`, a local directory or a Hub id."""
    layers: tuple[int, ...] = (2, 5, 8, 11)
    """Layers that are compressed."""
    keep: float = 0.5
    """Budget of the factorisations, pruning and merging."""
    bits: tuple[int, ...] = (4, 3, 2)
    """To which the weights are rounded with feedback, in groups of 32."""
    dampings: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Shares of its mean diagonal that are added to a second moment."""
    group_sizes: tuple[int, ...] = (2, 4, 8, 16)
    """Most experts that one of REAM's centroids takes."""
    calibration_tokens: int = 100_000
    """Tokens of the split: half are calibrated on, in the other half are the windows that are judged."""
    num_windows: int = 32
    """Windows that are judged."""
    threads: int = 1
    """CPU threads."""
    output: Path = RESULTS / "rival_settings.json"
    """Where the record is written."""


def main(config: RivalSettingsConfig) -> None:
    torch.set_num_threads(config.threads)
    logging.disable_progress_bar()
    model = resolve_model(config.model)
    stacks, dtype = read_stacks(model, config.layers)
    evaluator = Evaluator(model, max_tokens=1)
    seen, unseen = evaluator.split(CALIBRATION, config.calibration_tokens)[0].chunk(2)
    evaluator.windows = unseen[:: max(1, len(unseen) // config.num_windows)]
    calibration = evaluator.calibration(seen, stacks)
    rows: list[dict[str, Any]] = []

    def add(setting: str, value: float, method: str, approximation: Any) -> None:
        quality = evaluator.approximation(approximation.stacks, approximation.kept_experts)
        rows.append({"setting": setting, "value": value, "method": method, **quality})
        print(rows[-1], flush=True)

    for damping in config.dampings:
        with patch("benchmarks.calibration.DAMPING", damping), patch("benchmarks.rivals.gptq.DAMPING", damping):
            for method in ("whitened SVD", "D²-MoE", "TD-MoE"):
                add("damping", damping, method, CALIBRATED[method](stacks, config.keep, dtype, calibration))
            for bits in config.bits:
                add("damping", damping, f"int{bits}, GPTQ", gptq(stacks, bits, calibration))
    for size in config.group_sizes:
        with patch("benchmarks.rivals.ream.GROUP_SIZE", size):
            add("group size", size, "REAM", CALIBRATED["REAM"](stacks, config.keep, dtype, calibration))
    rows.sort(key=lambda row: (row["setting"], row["method"]))
    for _, tried in itertools.groupby(rows, key=lambda row: row["method"]):
        best = min(tried, key=lambda row: row["kl"])
        print(f"{best['method']}: best {best['setting']} {best['value']:g}")
    print_table("Settings of the rivals", rows, COLUMNS)
    write_record(config.output, "rival_settings", config, rows, [])


if __name__ == "__main__":
    main(tyro.cli(RivalSettingsConfig, description=__doc__))
