"""Amounts as people read them."""

from __future__ import annotations


def byte_size(count: float) -> str:
    """So many bytes, in the largest of B, kB, MB and GB (powers of 1000) of which there is a whole one."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"
