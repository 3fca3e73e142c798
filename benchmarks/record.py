"""The record of a benchmark: what was run, with what, and what came out."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numba.core.registry import cpu_target

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
    """Write a benchmark's rows and claims to the JSON file `path`, with settings, versions, processor and thread count.

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
            "machine": {
                "architecture": platform.machine(),
                "processor": _processor(),
                "threads": torch.get_num_threads(),
            },
            "claims": [dataclasses.asdict(claim) for claim in claims],
            "rows": list(rows),
        },
    )


def _processor() -> dict[str, str]:
    """Its name, and the vector extensions that are used of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    found = {"name": names[0] if names else platform.processor(), "torch": torch.backends.cpu.get_cpu_capability()}
    _, compiled_for, features = cpu_target.target_context.codegen().magic_tuple()
    vectors = sorted(x[1:] for x in features.split(",") if x.startswith(("+avx", "+neon", "+sve")))
    found["numba"] = " ".join([compiled_for, *vectors])
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    return Path(value).name if isinstance(value, str) and "/" in value else value
