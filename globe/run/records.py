"""Records of finished phases: each proves that it is whole and of which run, so that only the same run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from globe.checkpoint.writer import make_folder, write_json
from globe.errors import SettingsError

RUN = "run"
"""The record of what a run is made of."""


class Records:
    """The records of one run in a folder, `<name>.json` each."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder, self.run = folder, as_json(run)
        self.identity = _sha256(self.run)[:32]
        """Of the run: the same for the same source, settings and version."""

    def read(self, name: str) -> Any | None:
        """What was recorded; None where nothing was, where it was damaged since, and where it is of another run."""
        envelope = self._envelope(self.folder / f"{name}.json")
        return None if envelope is None or envelope["run"] != self.identity else envelope["record"]

    def write(self, name: str, record: Any) -> None:
        """Record what JSON can say; `OutputError` when the disk is full."""
        record = as_json(record)
        path = self.folder / f"{name}.json"
        make_folder(path.parent)
        write_json(path, {"run": self.identity, "sha256": _sha256([self.identity, record]), "record": record})

    def remove(self, name: str) -> None:
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def begin(self, *finished: str, overwrite: bool) -> bool:
        """Whether the folder holds the beginning of this very run; otherwise what it holds is to be removed.

        A run that finished nothing, no record that matches a pattern in `finished`, is in nobody's way. Raises
        `SettingsError` naming the settings that differ where another run has, unless `overwrite`.
        """
        paths = [path for pattern in finished for path in self.folder.glob(f"{pattern}.json")]
        envelopes = [envelope for path in paths if (envelope := self._envelope(path))]
        own = sum(envelope["run"] == self.identity for envelope in envelopes)
        earlier = self._envelope(self.folder / f"{RUN}.json")
        if earlier is None and own:  # damaged, but the records say whose they are
            self.write(RUN, self.run)
            return True
        if earlier is not None and earlier["record"] == self.run:
            return True
        if envelopes and not overwrite:
            differences = "" if earlier is None else f": {'; '.join(_differences(earlier['record'], self.run))}"
            raise SettingsError(
                f"{self.folder} holds {len(envelopes)} finished parts of a run with other settings{differences}. "
                "Repeat those settings to go on with it, choose another output, or give --overwrite to start anew"
            )
        return False

    @staticmethod
    def _envelope(path: Path) -> dict[str, Any] | None:
        try:
            envelope = json.loads(path.read_bytes() if path.is_file() else b"")  # a pipe or a device has no end
            intact = envelope.keys() == {"run", "sha256", "record"} and envelope["sha256"] == _sha256(
                [envelope["run"], envelope["record"]]
            )
        except (OSError, ValueError, AttributeError, RecursionError):
            return None
        return envelope if intact else None


def as_json(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _differences(earlier: Any, now: Mapping[str, Any]) -> Iterator[str]:
    """What differs, setting by setting."""
    for name in [*now, *(name for name in earlier if name not in now)]:
        then, wanted = earlier.get(name), now.get(name)
        if isinstance(then, Mapping) and isinstance(wanted, Mapping):
            yield from _differences(then, wanted)
        elif then != wanted:
            yield f"{name} was {then!r}, now {wanted!r}"
