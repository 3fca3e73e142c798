"""An unfinished output: where it is built, what of it is whole, and how it gets its name.

    <output>.partial/         the output as far as it is written
        unfinished/           what is no part of it: the lock, run.json, the records of finished phases and their files

When everything is there, `whole.json` says so with the SHA-256 of every file; then the folder gets its name, and
`unfinished` goes last. A kill before, between or after leaves something that the same command goes on with. Where the
output is a folder that has to stay (a mount point, the working directory) it is built in `<output>/.partial`, and its
files are moved one by one, config.json, without which nothing loads it, near the end.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from globe.checkpoint.digest import file_sha256
from globe.checkpoint.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from globe.checkpoint.side_files import CONFIG
from globe.checkpoint.writer import TEMPORARY, make_folder, sync_folder, write_json
from globe.errors import CheckpointError, FinishedError, OutputError
from globe.run.records import RUN, Records

UNFINISHED = "unfinished"
PARTIAL = ".partial"
_FINISHED = ("scope-*", "whole")
"""Records that a run is not to lose."""
_WHOLE, _LOCK, _HOLDER, _REPLACED, _PASSING = "whole", "lock", "holder.json", ".replaced", "source"


class RunFolder:
    """The output of one run while it is made. `open_run` gives it, locked."""

    def __init__(self, output: Path, path: Path, run: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.output, self.path = output, path
        self.records = Records(path / UNFINISHED, run)
        self._overwrite = overwrite
        self._whole: dict[str, str] | None = None

    def file(self, name: str) -> Path:
        """The place of a phase's own file, which is no part of the output."""
        return self.path / UNFINISHED / name

    def holds(self, files: Mapping[str, str]) -> bool:
        """Whether all of these files of the output are there with these SHA-256."""
        return all(_is(self.path / name, sha256) for name, sha256 in files.items())

    def whole(self) -> bool:
        """Whether everything is there, and only the name is missing."""
        if self._whole is None and (files := self._listed()) is not None:
            if all(_is(self._place(name), sha256) for name, sha256 in files.items()):
                self._whole = files
            else:
                self.records.remove(_WHOLE)
        return self._whole is not None

    def complete(self, files: Mapping[str, str]) -> None:
        """All files of the output are there, with these SHA-256: write its manifest and record that it is whole."""
        for leftover in self.path.rglob(f"*{TEMPORARY}"):  # of a write that was killed
            leftover.unlink()
        for name in [path.name for path in self.path.iterdir() if path.is_file()]:
            if name not in files:  # of a run that was done anew in part
                (self.path / name).unlink()
        manifest = write_manifest(self.path, Manifest(self.records.identity, files))
        self._whole = {**files, MANIFEST: manifest}
        self.records.write(_WHOLE, self._whole)

    def publish(self) -> None:
        """Give the whole output its name, then forget everything that is no part of it.

        Raises `OutputError` if something else has taken the name; the output then stays whole where it was built.
        """
        assert self._whole is not None
        try:
            if self.path.parent == self.output:
                self._move_files(self._whole)
            elif self.path != self.output:
                self._move_folder()
        except OSError as error:
            reason = error if isinstance(error, OutputError) else f"it cannot be moved ({error})"
            raise OutputError(
                f"the finished output is whole in {self.path} but cannot get its name {self.output}: {reason}. "
                "Make the name free and run the same command again: it only has to move it"
            ) from error
        self._remove_replaced()
        shutil.rmtree(self.path if self.path.parent == self.output else self.output / UNFINISHED)

    def wipe(self) -> None:
        """Remove everything but the lock."""
        for path in [*self.path.iterdir(), *(self.path / UNFINISHED).iterdir()]:
            if path.name not in (UNFINISHED, _LOCK, _HOLDER):
                _remove(path)

    def _listed(self) -> dict[str, str] | None:
        if self.path != self.output:
            return self.records.read(_WHOLE)
        manifest = read_manifest(self.path)  # which survives the last of the records
        return dict(manifest.files) if manifest is not None and manifest.run == self.records.identity else None

    def _place(self, name: str) -> Path:
        """Of a file of the whole output, which may have been moved already."""
        moved = self.output / name
        return moved if self.path.parent == self.output and moved.exists() else self.path / name

    def _move_files(self, files: Mapping[str, str]) -> None:
        last = (CONFIG, MANIFEST)
        for name in [*(name for name in files if name not in last), *(name for name in last if name in files)]:
            if (self.path / name).exists():
                make_folder((self.output / name).parent)
                (self.path / name).replace(self.output / name)
        sync_folder(self.output)

    def _move_folder(self) -> None:
        if self.output.exists():
            if self._overwrite and is_written(self.output):
                self._remove_replaced()
                self.output.rename(_replaced(self.output))
            else:
                check_vacant(self.output)
                self.output.rmdir()
        self.path.rename(self.output)
        sync_folder(self.output.parent)

    def _remove_replaced(self) -> None:
        if self._overwrite and is_written(_replaced(self.output)):
            shutil.rmtree(_replaced(self.output))


def place_of_shards(output: Path) -> Path:
    """The folder in which the run that builds `output` has shards of the Hub as long as it reads them."""
    return _building_place(_resolved(output)) / UNFINISHED / _PASSING


@contextlib.contextmanager
def open_run(
    output: Path, run: Mapping[str, Any], *, overwrite: bool = False, source: Path | None = None
) -> Iterator[RunFolder]:
    """The folder in which the run (what JSON can say of it) builds `output`, with what an earlier try of it left there.

    Links are followed. One process at a time has it. With `overwrite`, an output that GloBE wrote and an unfinished run
    with other settings make room, the former when the new one is whole.

    Raises `FinishedError` if this very run has made the output, `OutputError` if it is not free, cannot be made, or
    another process is at it, and `SettingsError` naming the settings that differ where another run has finished parts
    there.
    """
    output = _resolved(output)
    if (output / UNFINISHED).is_dir():  # killed between getting its name and the end
        with held(output / UNFINISHED, output):
            folder = RunFolder(output, output, run)
            if folder.whole():
                yield folder
                return
    path = _building_place(output)
    folder = RunFolder(output, path, run, overwrite=overwrite)
    _check_free(output, path, folder.records, overwrite=overwrite, source=source)
    make_folder(path / UNFINISHED)
    with held(path / UNFINISHED, output):
        try:
            # it may have been taken meanwhile
            _check_free(output, path, folder.records, overwrite=overwrite, source=source)
            _begin(folder, overwrite=overwrite)
        except OutputError:
            _forget_attempt(path)
            raise
        yield folder


@contextlib.contextmanager
def held(folder: Path, output: Path) -> Iterator[None]:
    """Hold the lock in `folder` of an unfinished output; `OutputError` naming the holder if another process does."""
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"{output} is being written by another run ({_holder(folder)}): wait for it, or choose another output"
        ) from error
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error}): choose another folder") from error
    try:
        if not (folder / _LOCK).exists():  # whoever had it was just about to finish
            raise OutputError(f"{output} was finished by another run a moment ago: choose another output")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(folder / _HOLDER, {"process": os.getpid(), "host": socket.gethostname(), "since": now})
        yield
    finally:
        lock.release()


def check_output(output: Path) -> None:
    """Raise `OutputError` if no run at all can write the output: it is neither vacant nor of GloBE's making.

    `open_run` knows more, once the source is read.
    """
    output = _resolved(output)
    if _building_place(output).parent != output and not is_written(output):
        check_vacant(output)


def is_written(output: Path) -> bool:
    """Whether GloBE has made what is there."""
    return (output / MANIFEST).is_file()


def check_vacant(output: Path) -> None:
    """Raise `OutputError` if the output exists and is not an empty folder."""
    if output.is_dir():
        if any(output.iterdir()):
            raise OutputError(
                f"output folder {output} exists and is not empty: choose another name, or give --overwrite if it is an "
                "output of GloBE's that may go"
            )
    elif output.exists():
        raise OutputError(f"output {output} exists and is a file: choose another name")


def _begin(folder: RunFolder, *, overwrite: bool) -> None:
    if _is_untouched(folder.path / UNFINISHED) and len(list(folder.path.iterdir())) > 1:
        raise OutputError(f"{folder.path} holds files that are not of an unfinished run: choose another output")
    if not folder.records.begin(*_FINISHED, overwrite=overwrite):
        folder.wipe()
        folder.records.write(RUN, folder.records.run)


def _check_free(output: Path, path: Path, records: Records, *, overwrite: bool, source: Path | None) -> None:
    if path.parent == output:
        others = {entry.name for entry in output.iterdir()} - {PARTIAL}
        if others and records.read(_WHOLE) is None:
            raise OutputError(
                f"output folder {output} is not empty, and cannot be replaced since it is a mount point or the working "
                "directory: empty it, or choose a folder in it"
            )
    elif overwrite and is_written(output):
        if source is not None and (source.resolve() == output or output in source.resolve().parents):
            raise OutputError(f"output {output} holds the model that is read: choose another name")
    else:
        _check_unfinished(output, records)
        check_vacant(output)


def _check_unfinished(output: Path, records: Records) -> None:
    """Raise `FinishedError` if this very run has written the output."""
    with contextlib.suppress(CheckpointError):
        manifest = read_manifest(output)
        if manifest is not None and manifest.run == records.identity:
            raise FinishedError(
                f"{output} exists, and this very run has written it: there is nothing to do. `globe verify` proves its "
                "files, --overwrite makes them again"
            )


def _resolved(output: Path) -> Path:
    try:
        return output.expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise OutputError(f"output {output} leads nowhere ({error}): choose another name") from error


def _building_place(output: Path) -> Path:
    stays = not output.name or output.is_mount() or output == Path.cwd()
    if output.is_dir() and (stays or not os.access(output.parent, os.W_OK)):
        return output / PARTIAL
    return output.with_name(f"{output.name}{PARTIAL}")


def _replaced(output: Path) -> Path:
    return output.with_name(f"{output.name}{_REPLACED}")


def _is(path: Path, sha256: str) -> bool:
    try:
        return file_sha256(path) == sha256
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_untouched(unfinished: Path) -> bool:
    return {entry.name for entry in unfinished.iterdir()} <= {_LOCK, _HOLDER}


def _forget_attempt(path: Path) -> None:
    """Remove what taking the lock has made in a folder that is not to be used."""
    with contextlib.suppress(OSError):
        if _is_untouched(path / UNFINISHED):
            shutil.rmtree(path / UNFINISHED)
            path.rmdir()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / _HOLDER).read_bytes())
        return f"process {int(holder['process'])} on {str(holder['host'])[:64]}, since {str(holder['since'])[:32]}"
    except (OSError, ValueError, TypeError, KeyError):
        return "it does not say which"
