"""In how many bits the factors of a bank are stored."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Precision:
    """Bits of the entries of each factor as it is stored; None for a factor in floating point."""

    bases: int | None = None
    codes: int | None = None
    adapters: int | None = None
