"""A checkpoint as its files are: names, shapes and places of all tensors at once, the data a tensor at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from globe.checkpoint.digest import settled_sha256
from globe.checkpoint.header import TensorInfo, check_entries, read_header
from globe.checkpoint.hub import HubRepo, open_repo
from globe.checkpoint.redirects import refuse_redirects
from globe.checkpoint.side_files import CONFIG, SideFiles, find_side_files, outside
from globe.errors import CheckpointError, SettingsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; its headers have been checked, its data has not been touched."""

    folder: Path
    """Where the configuration and the small files lie."""
    config: dict[str, Any]
    """config.json."""
    tensors: dict[str, TensorInfo]
    """By name; shard after shard, each in the order of its bytes."""
    shards: tuple[str, ...]
    """The weight files, relative to the folder, in order."""
    repo: HubRepo | None = None
    """Where shards come from that are not in the folder yet; None for a local folder."""

    @property
    def stored_plainly(self) -> bool:
        """Whether the files hold the bytes of the tensors as they are read."""
        return True

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU in its stored dtype. A shard on the Hub is downloaded when first read."""
        return next(self.read_many([name]))[1]

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each in turn; neighbours in the same shard share one opening of the file."""
        for shard, group in itertools.groupby(names, lambda name: self._info(name).shard):
            try:
                with safe_open(self.shard_path(shard), framework="pt") as file:
                    for name in group:
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{shard} cannot be read any more: {error}; was it changed or removed?"
                ) from error

    def shard_path(self, shard: str) -> Path:
        """The shard's file, downloaded first if it is on the Hub; `CheckpointError` unless it is what was announced."""
        path = self.folder / shard
        if self.repo is not None and not path.exists():
            path = self.repo.fetch(shard)
            if read_header(path, shard) != self.shard_tensors(shard):
                raise CheckpointError(f"{shard}: the header of the downloaded file is not the one the Hub announced")
        return path

    def fetched(self) -> Path:
        """The folder, with all shards in it: those on the Hub are downloaded first."""
        for shard in self.shards:
            self.shard_path(shard)
        return self.folder

    def shard_tensors(self, shard: str) -> list[TensorInfo]:
        """The shard's tensors in the order of their bytes."""
        return [tensor for tensor in self.tensors.values() if tensor.shard == shard]

    def fingerprint(self) -> str:
        """SHA-256 that changes when the checkpoint does: of the configuration, the headers and the content's identity.

        The identity is the commit on the Hub. Of local files it is every byte, which are read once in a process and
        again only where a file's size or time has changed.
        """
        described = [self.config, [dataclasses.astuple(tensor) for tensor in self.tensors.values()]]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        if self.repo is not None:
            digest.update(self.repo.commit.encode())
        else:
            for shard in self.shards:
                try:
                    digest.update(settled_sha256(self.folder / shard).encode())
                except OSError as error:
                    raise CheckpointError(
                        f"{shard} cannot be read any more: {error}; was it changed or removed?"
                    ) from error
        return digest.hexdigest()

    def side_files(self) -> SideFiles:
        """What an output takes over unchanged, and what is left out."""
        return find_side_files(self.folder)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}")
        return self.tensors[name]


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a local folder or a Hub id (of which `revision` names a branch, tag or commit) without reading weights.

    Raises `CheckpointError` for anything missing, damaged, inconsistent or outside the folder.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise SettingsError(f"revision {revision!r} was asked of the local folder {folder}; only Hub ids have them")
        return _open_folder(folder, None)
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder with {CONFIG} and the safetensors files")
    repo_id = str(model)
    if folder.is_absolute() or repo_id.startswith((".", "~")) or repo_id.count("/") > 1:
        raise CheckpointError(f"{repo_id} does not exist (and is no Hub id, which would be owner/name)")
    repo, folder = open_repo(repo_id, revision)
    return _open_folder(folder, repo)


def _open_folder(folder: Path, repo: HubRepo | None) -> Checkpoint:
    config = _read_json(folder / CONFIG)
    refuse_redirects(folder, config)
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():  # transformers' order of preference
        weight_map = _read_weight_map(folder)
        shards = tuple(sorted(set(weight_map.values())))
    else:
        weight_map, shards = None, (SINGLE,)
    if repo is None:
        _check_present(folder, shards)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        if repo is None or (folder / shard).exists():
            found = read_header(_contained(folder, shard), shard)
        else:
            found = check_entries(repo.header(shard), shard)
        if weight_map is not None:
            _check_index({name for name, place in weight_map.items() if place == shard}, found, shard)
        tensors.update((tensor.name, tensor) for tensor in found)
    return Checkpoint(folder, config, tensors, shards, repo)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}; is it the folder of a Hugging Face model?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def _read_weight_map(folder: Path) -> dict[str, str]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor names to files")
    for name, shard in weight_map.items():
        check_shard_name(INDEX, name, shard)
    return weight_map


def check_shard_name(record: str, name: str, shard: object) -> None:
    """Raise `CheckpointError` unless the file that `record` places tensor `name` in is safetensors in the folder."""
    if not isinstance(shard, str) or not shard.endswith(".safetensors"):
        raise CheckpointError(f"{record} places tensor {name!r} in {shard!r}; only safetensors files are read")
    if "\\" in shard or PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
        raise CheckpointError(f"{record} places tensor {name!r} in {shard!r}, outside the folder: it is not followed")


def _check_present(folder: Path, shards: tuple[str, ...]) -> None:
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if not missing:
        return
    if missing != [SINGLE]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {_some(missing)}; download them again"
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf"})
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if others and not loose:
        raise CheckpointError(
            f"{folder} holds its weights as {_some(others)}; only safetensors is read: "
            "convert it first (load it in transformers and save_pretrained)"
        )
    found = f"{_some(loose)} without an index" if loose else "no weights at all"
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; it has {found}")


def _contained(folder: Path, shard: str) -> Path:
    """The shard's path; `CheckpointError` if links lead out of the folder to other than the blobs of a Hub cache."""
    if (path := outside(folder, shard)) is not None:
        raise CheckpointError(f"{folder / shard} is a link to {path}, outside the folder: it is not followed")
    return folder / shard


def _check_index(indexed: set[str], found: list[TensorInfo], shard: str) -> None:
    held = {tensor.name for tensor in found}
    if absent := sorted(indexed - held):
        raise CheckpointError(f"{INDEX} places {len(absent)} tensors in {shard} that it lacks: {_some(absent)}")
    if unlisted := sorted(held - indexed):
        raise CheckpointError(
            f"{shard} holds {len(unlisted)} tensors that {INDEX} does not place there: {_some(unlisted)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
