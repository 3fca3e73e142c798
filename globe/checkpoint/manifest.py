"""What a finished folder holds, byte for byte: the SHA-256 of every file that was written into it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from globe.checkpoint.digest import file_sha256
from globe.checkpoint.files import unwritten
from globe.checkpoint.writer import TEMPORARY, write_file, write_json
from globe.errors import CheckpointError

MANIFEST = "globe_manifest.json"
VERSION = 1
DOCUMENTS = (".md", ".html", ".csv", ".png", ".yaml", "evaluation.json")
"""Endings of files that tell of the model, and whose change does not change it."""
_NAMED = 6


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The record of a folder."""

    run: str
    """Identity of the run that wrote it."""
    files: Mapping[str, str]
    """SHA-256 by name, relative to the folder; all files but the manifest itself."""

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, "run": self.run, "files": dict(sorted(self.files.items()))}


@dataclasses.dataclass(frozen=True)
class Verification:
    """A folder that is as it was written."""

    run: str
    """Identity of the run that wrote it."""
    num_files: int
    """Files that were compared."""
    num_bytes: int
    """Bytes in them."""
    unlisted: tuple[str, ...]
    """Files that were put there later; nothing is known of them."""


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write the manifest of a folder whose files are all there; returns its SHA-256."""
    return write_json(folder / MANIFEST, manifest.to_json())


def write_listed(folder: Path, name: str, content: bytes) -> None:
    """Write a file into a finished folder and list it in its manifest, if it has one.

    In between the file is not listed, so that a kill leaves a folder that verifies.
    """
    if (manifest := read_manifest(folder)) is None:
        write_file(folder / name, content)
        return
    others = {other: sha256 for other, sha256 in manifest.files.items() if other != name}
    if name in manifest.files:
        write_manifest(folder, Manifest(manifest.run, others))
    sha256 = write_file(folder / name, content)
    write_manifest(folder, Manifest(manifest.run, {**others, name: sha256}))


def list_documents(folder: Path) -> None:
    """List the documents that the manifest knows as they are now: those that people edited, and not those they
    removed."""
    manifest = read_manifest(folder)
    if manifest is None:
        return
    files = dict(manifest.files)
    for name in [name for name in files if name.endswith(DOCUMENTS)]:
        if (folder / name).is_file():
            files[name] = file_sha256(folder / name)
        else:
            del files[name]
    if files != manifest.files:
        write_manifest(folder, Manifest(manifest.run, files))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None if it has none; `CheckpointError` unless it is one, to the last byte."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        manifest = Manifest(content["run"], content["files"])
        intact = raw == (json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n").encode()
        names = all(_is_inside(name) and isinstance(sha256, str) for name, sha256 in manifest.files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r}): fetch the folder again") from error
    if not intact or not names or not isinstance(manifest.run, str):
        raise CheckpointError(f"{path} is not as it was written: fetch the folder again")
    return manifest


def verify_files(folder: Path, names: Iterable[str] | None = None) -> Verification:
    """Compare every file of a folder (or those in `names`) with what its manifest says was written.

    Files that the manifest does not list are returned, except those whose names begin with a dot; weights among them
    are an error, for they would be loaded. Raises `CheckpointError` naming the files that are missing or changed, and
    for a folder without a manifest.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        why = unwritten(folder) or "only what GloBE's commands write has one"
        raise CheckpointError(f"{folder} has no {MANIFEST}, so its bytes cannot be proved: {why}")
    chosen = manifest.files if names is None else {name: manifest.files[name] for name in names}
    missing = [name for name in chosen if not (folder / name).is_file()]
    changed = [name for name in chosen if name not in missing and file_sha256(folder / name) != chosen[name]]
    unlisted = sorted(_held(folder) - manifest.files.keys() - {MANIFEST})
    weights = [name for name in unlisted if name.endswith((".safetensors", ".index.json"))]
    faults = {"missing": missing, "changed since it was written": changed, "not of this run": weights}
    if faulty := [f"{what}: {_some(names)}" for what, names in faults.items() if names]:
        raise CheckpointError(f"{folder}: {'; '.join(faulty)}. Fetch the folder again, or repeat the run that wrote it")
    num_bytes = sum((folder / name).stat().st_size for name in chosen)
    return Verification(manifest.run, len(chosen), num_bytes, tuple(unlisted))


def verify_model(folder: Path) -> bool:
    """Verify what a model is loaded from, without the documents beside it; whether the folder has a manifest.

    Raises `CheckpointError` as `verify_files` does.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    verify_files(folder, [name for name in manifest.files if not name.endswith(DOCUMENTS)])
    return True


def _held(folder: Path) -> set[str]:
    """Names of all files in a folder, but for hidden ones and those in folders with a manifest of their own."""
    held: set[str] = set()
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".") and not (here / name / MANIFEST).is_file()]
        held.update(
            (here / name).relative_to(folder).as_posix()
            for name in files
            if not name.startswith(".") and not name.endswith(TEMPORARY)
        )
    return held


def _is_inside(name: object) -> bool:
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
