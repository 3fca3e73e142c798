"""Amounts as people read them."""

from __future__ import annotations

import re


def byte_size(count: float) -> str:
    """So many bytes, in the largest of B, kB, MB and GB (powers of 1000) of which there is a whole one."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def read_size(text: str) -> float | None:
    """Bytes of a size such as `16GB` or `15.9 GiB`, in letters of any case; None for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None:
        return None
    number, prefix, binary = found.groups()
    return float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1 if prefix else 0)


def with_error(value: float, error: float | None) -> str:
    """A value to five digits, and its standard error where that is known."""
    return f"{value:.5f}" if error is None else f"{value:.5f} ± {error:.5f}"
