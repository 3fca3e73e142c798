"""Where the time of a bank goes."""

from __future__ import annotations

import time


class PhaseClock:
    """Seconds by phase; a phase ends when the next one begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def end(self, phase: str) -> None:
        """What passed since the last phase ended was this one."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._began
        self._began = now
