"""What a resumable run in a folder is made of, so that only the same run goes on there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from globe.checkpoint.writer import write_json
from globe.errors import OutputError, SettingsError

RUN = "run.json"


def resume_or_begin(folder: Path, run: Mapping[str, Any]) -> None:
    """Check that the run in `folder` was begun with this very `run` (what JSON can say), or begin one.

    Raises `SettingsError` naming the settings that differ, `OutputError` for a folder that holds other things.
    """
    path, run = folder / RUN, as_json(run)
    if not path.exists():
        if any(folder.iterdir()):
            raise OutputError(
                f"{folder} holds files that are not of an unfinished run: remove it or choose another output"
            )
        write_json(path, run)
        return
    try:
        earlier = json.loads(path.read_text())
    except ValueError as error:
        raise OutputError(f"{path} cannot be read ({error}): remove {folder} to start anew") from error
    if earlier != run:
        raise SettingsError(
            f"{folder} holds a run with other settings: {'; '.join(_differences(earlier, run))}. "
            f"Repeat those settings to go on with it, or remove {folder} to start anew"
        )


def as_json(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs, setting by setting."""
    for name in [*now, *(name for name in earlier if name not in now)]:
        then, wanted = earlier.get(name), now.get(name)
        if isinstance(then, Mapping) and isinstance(wanted, Mapping):
            yield from _differences(then, wanted)
        elif then != wanted:
            yield f"{name} was {then!r}, now {wanted!r}"
