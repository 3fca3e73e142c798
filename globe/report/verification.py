"""What verify prints."""

from __future__ import annotations

from pathlib import Path

from globe.checkpoint.manifest import verify_files
from globe.terminal import Terminal
from globe.units import byte_size


def show_verification(console: Terminal, folder: Path) -> None:
    """What a folder's files are, compared with what was written; `CheckpointError` for any that differ."""
    verified = verify_files(folder)
    size = byte_size(verified.num_bytes)
    console.print(f"{verified.num_files} files, {size}: every byte is as run {verified.run} wrote it", soft_wrap=True)
    if verified.unlisted:
        names = ", ".join(verified.unlisted)
        console.print(f"put there later, and not checked: {names}", style="yellow", soft_wrap=True)
