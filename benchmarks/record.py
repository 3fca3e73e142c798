"""The record of a benchmark: what was run, with what, and what came out."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from globe.checkpoint.writer import write_json
from globe.version import versions

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that is claimed, and what was measured."""

    statement: str
    measured: str
    holds: bool


def write_record(
    path: Path, benchmark: str, config: Any, rows: Sequence[Mapping[str, Any]], claims: Sequence[Claim]
) -> None:
    """Write a benchmark's rows and claims to the JSON file `path`, with settings, versions and thread count.

    `config` is the benchmark's dataclass of settings; paths in it are reduced to their names.
    """
    settings = {name: _plain(value) for name, value in dataclasses.asdict(config).items() if name != "output"}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "benchmark": benchmark,
            "settings": settings,
            "versions": versions(),
            "machine": {"architecture": platform.machine(), "threads": torch.get_num_threads()},
            "claims": [dataclasses.asdict(claim) for claim in claims],
            "rows": list(rows),
        },
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    return Path(value).name if isinstance(value, str) and "/" in value else value
