"""A checkpoint as its files are: names, shapes and places of all tensors at once, the data a tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from globe.checkpoint.bounds import check_counts
from globe.checkpoint.digest import settled_sha256
from globe.checkpoint.files import check_contained, read_json, readable, unfinished
from globe.checkpoint.header import TensorInfo, check_entries, read_header
from globe.checkpoint.hub import HubRepo, open_repo
from globe.checkpoint.redirects import refuse_redirects
from globe.checkpoint.shards import HubShards
from globe.checkpoint.side_files import CONFIG, SideFiles, find_side_files
from globe.errors import CheckpointError, SettingsError
from globe.typed import parsed, shown

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CONNECTIONS = 16
"""To the Hub at once."""
_HUB = "https://huggingface.co/"
_CONVERT_GGUF = "load it in transformers with gguf_file=NAME and save_pretrained"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_NO_SHARD = "; only safetensors files are read"
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")


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
    """Of a model on the Hub."""
    notes: tuple[str, ...] = ()
    """What was passed over, for the user to know: where index and files disagree."""
    coming: HubShards | None = dataclasses.field(default=None, repr=False, compare=False)
    """Where shards come from that are not in the folder yet; None for a local folder."""

    @property
    def stored_plainly(self) -> bool:
        """Whether the files hold the bytes of the tensors as they are read."""
        return True

    @property
    def files(self) -> Checkpoint:
        """As the files are: itself, but for a view of quantised ones."""
        return self

    @property
    def is_composed(self) -> bool:
        """Whether the experts of a layer are made together, and kept, when one of them is read."""
        return False

    @property
    def loaded_bytes(self) -> int:
        """Of its tensors in memory, in the dtypes that they are stored in."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_passing(self) -> bool:
        """Whether shards go again when they were read, so that it is never here as a whole."""
        return self.coming is not None and self.coming.folder is not None

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
        return path if self.coming is None or path.exists() else self.coming.path(shard)

    def fetched(self) -> Path:
        """The folder, with all shards in it: those on the Hub are downloaded first."""
        for shard in self.shards:
            self.shard_path(shard)
        return self.folder

    def shard_tensors(self, shard: str) -> list[TensorInfo]:
        """The shard's tensors in the order of their bytes."""
        return self._by_shard.get(shard, [])

    @functools.cached_property
    def _by_shard(self) -> dict[str, list[TensorInfo]]:
        grouped: dict[str, list[TensorInfo]] = {}
        for tensor in self.tensors.values():
            grouped.setdefault(tensor.shard, []).append(tensor)
        return grouped

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
            raise CheckpointError(f"{self.folder} holds no tensor {shown(name)}")
        return self.tensors[name]


def open_checkpoint(
    model: str | Path, revision: str | None = None, cache: Path | None = None, passing: Path | None = None
) -> Checkpoint:
    """Open a local folder or a Hub id (of which `revision` names a branch, tag or commit, and which is kept in `cache`
    or the client's own) without reading weights. In a folder `passing` a few shards of a Hub id lie at a time, as they
    are read, and the cache keeps no more of them than it has.

    What the index says is believed of the files' names only: which tensor lies where, the files themselves tell.
    Raises `CheckpointError` for anything missing, damaged, inconsistent or outside the folder.
    """
    folder = Path(model)
    with readable(folder):
        is_folder, exists = folder.is_dir(), folder.exists()
    if is_folder:
        if revision is not None:
            raise SettingsError(f"revision {revision!r} was asked of the local folder {folder}; only Hub ids have them")
        if passing is not None:
            raise SettingsError(f"low_disk is for a model of the Hub, and {folder} is a local folder: leave it out")
        return _open_folder(folder)
    if exists:
        kind = "holds weights as GGUF, which is not read" if folder.suffix == ".gguf" else "is a file"
        raise CheckpointError(f"{folder} {kind}; give the folder with {CONFIG} and the safetensors files")
    if (why := unfinished(folder)) is not None:
        raise CheckpointError(f"{folder} is not there: {why}")
    repo_id = str(model).rstrip("/")
    if repo_id.startswith(_HUB):
        owner_and_name = "/".join(repo_id.removeprefix(_HUB).split("/")[:2])
        raise CheckpointError(f"{repo_id} is an address; give the Hub id alone: {owner_and_name}")
    if folder.is_absolute() or repo_id.startswith((".", "~")) or repo_id.count("/") > 1:
        raise CheckpointError(f"{repo_id} does not exist (and is no Hub id, which would be owner/name)")
    repo, folder = open_repo(repo_id, revision, cache)
    return _open_folder(folder, repo, passing)


def _open_folder(folder: Path, repo: HubRepo | None = None, passing: Path | None = None) -> Checkpoint:
    if repo is None:
        _check_is_model(folder)
    config = _read_config(folder / CONFIG)
    refuse_redirects(folder, config)
    with readable(folder):
        single, indexed = (folder / SINGLE).exists(), (folder / INDEX).exists()
    weight_map = _read_weight_map(folder) if indexed else None
    notes: list[str] = []
    if weight_map is None or set(weight_map.values()) == {SINGLE}:
        shards = (SINGLE,)
    elif single:  # transformers' order of preference
        shards = (SINGLE,)
        _check_stray(folder, weight_map)
        notes.append(f"{SINGLE} is read, as transformers does; {INDEX} beside it and the files it names are not")
        weight_map = None
    else:
        shards = tuple(sorted(set(weight_map.values())))
    if repo is None:
        _check_present(folder, shards)
    tensors: dict[str, TensorInfo] = {}
    for entries in _read_headers(folder, repo, shards):
        for tensor, shard in ((tensor, tensor.shard) for tensor in entries):
            if (other := tensors.setdefault(tensor.name, tensor)) is not tensor:
                raise CheckpointError(
                    f"tensor {shown(tensor.name)} is in {other.shard} and in {shard}, and only one can be meant: take "
                    "it out of one of them, or download the checkpoint again"
                )
    if weight_map is not None:
        notes += _differences(weight_map, tensors)
    coming = None if repo is None else HubShards(repo, shards, tensors, passing)
    checkpoint = Checkpoint(folder, config, tensors, shards, repo, tuple(notes), coming)
    check_counts(config, tensors.values())
    return checkpoint


def _read_headers(folder: Path, repo: HubRepo | None, shards: tuple[str, ...]) -> Iterator[list[TensorInfo]]:
    """Of every shard in turn; those that are on the Hub are asked for side by side."""

    def read(shard: str) -> list[TensorInfo]:
        if repo is None or (folder / shard).exists():
            check_contained(folder / shard, folder)
            return read_header(folder / shard, shard)
        return check_entries(repo.header(shard), shard)

    if repo is None:
        yield from map(read, shards)
        return
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        yield from pool.map(read, shards)


@dataclasses.dataclass(frozen=True)
class _TextConfig:
    """The entries of config.json that decide how the rest is read; the others are transformers' to judge."""

    model_type: str | None = None
    num_hidden_layers: int | None = None
    zero_expert_num: int | None = None


@dataclasses.dataclass(frozen=True)
class _Config(_TextConfig):
    text_config: _TextConfig | None = None


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    parsed(_Config, config, str(path), CheckpointError)
    return config


def _read_weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor names to files")
    for name, shard in weight_map.items():
        check_shard_name(INDEX, name, shard)
    return weight_map


def check_shard_name(record: str, name: str, shard: object) -> None:
    """Raise `CheckpointError` unless the file that `record` places tensor `name` in is safetensors in the folder."""
    if (fault := _fault_of(shard) if isinstance(shard, str) else _NO_SHARD) is not None:
        raise CheckpointError(f"{record} places tensor {shown(name)} in {shown(shard)}{fault}")


@functools.lru_cache
def _fault_of(shard: str) -> str | None:
    """What is wrong with a name that thousands of tensors have in common."""
    if not shard.endswith(".safetensors") or not shard.isprintable():
        return _NO_SHARD
    if "\\" in shard or PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
        return ", outside the folder: it is not followed"
    return None


def _check_is_model(folder: Path) -> None:
    """Raise `CheckpointError` with the next step for a folder that is not that of a model in safetensors."""
    with readable(folder):
        names = {path.name for path in folder.iterdir()}
        inner = sorted(path.parent for path in [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"snapshots/*/{CONFIG}")])
    weights = [name for name in names if name.endswith(_WEIGHTS) and not name.startswith("adapter_")]
    if "adapter_config.json" in names and not weights:
        raise CheckpointError(
            f"{folder} holds an adapter (LoRA) and not a model: merge it into its base first, in peft "
            "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(MERGED)"
        )
    if "model_index.json" in names:
        raise CheckpointError(f"{folder} is a pipeline of diffusers; give the folder of a language model")
    if CONFIG in names:
        return
    if "unfinished" in names:
        raise CheckpointError(f"{folder} is of a run that is not finished; the command that began it goes on with it")
    if inner:
        more = f" or one of {len(inner) - 1} more" if len(inner) > 1 else ""
        raise CheckpointError(f"{folder} has no {CONFIG}, but {inner[0]} has{more}: give that folder")
    if ggufs := sorted(name for name in weights if name.endswith(".gguf")):
        raise CheckpointError(f"{folder} holds {_some(ggufs)}, and GGUF is not read: {_CONVERT_GGUF}")
    content = f"it holds {_some(sorted(names))}" if names else "it is empty"
    raise CheckpointError(f"{folder} has no {CONFIG}; {content}: is it the folder of a Hugging Face model?")


def _check_stray(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Raise `CheckpointError` where a single file lies beside an index that tells of another model."""
    shards = sorted(set(weight_map.values()))
    if not any((folder / shard).exists() for shard in shards):
        return
    held = {tensor.name for tensor in read_header(folder / SINGLE, SINGLE)}
    if held != weight_map.keys():
        raise CheckpointError(
            f"{folder} holds {SINGLE} of {len(held)} tensors beside an index of {len(weight_map)} tensors in "
            f"{_some(shards)}: transformers would read the first alone. Remove {SINGLE}, or {INDEX} and its files, "
            "whichever does not belong to the model"
        )


def _check_present(folder: Path, shards: tuple[str, ...]) -> None:
    with readable(folder):
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if not missing:
            return
        if missing != [SINGLE]:
            broken = [shard for shard in missing if (folder / shard).is_symlink()]
            more = ", which are links to files that are gone" if broken == missing else ""
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(shards)} shards are missing: {_some(missing)}{more}; "
                "download them again"
            )
        weights = sorted(path.name for path in folder.iterdir() if path.name.endswith(_WEIGHTS))
    loose = [name for name in weights if name.endswith(".safetensors")]
    others = [name for name in weights if name not in loose]
    if others and not loose:
        how = _CONVERT_GGUF if others[0].endswith(".gguf") else "load it in transformers and save_pretrained"
        raise CheckpointError(
            f"{folder} holds its weights as {_some(others)}; only safetensors is read: convert it first ({how})"
        )
    content = "it has no weights at all"
    if len(loose) == 1 and not _SHARD.fullmatch(loose[0]):
        content = f"it has {loose[0]}; if that is the whole model, rename it to {SINGLE}"
    elif loose:
        content = f"it has {_some(loose)} without an index; download that too"
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; {content}")


def _differences(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Where index and files disagree; transformers goes by the files, and whether the model needs what is not there is
    found where its tensors are looked for."""
    absent = sorted(weight_map.keys() - tensors.keys())
    unlisted = sorted(tensors.keys() - weight_map.keys())
    moved = [name for name, shard in weight_map.items() if name in tensors and tensors[name].shard != shard]
    differences = [
        (absent, "that no file holds; they are left out"),
        (moved, "in other files than those that hold them; they are read where they are"),
    ]
    notes = [f"{INDEX} lists {len(names)} tensors {what}: {_some(names)}" for names, what in differences if names]
    if unlisted:
        notes.append(
            f"the files hold {len(unlisted)} tensors that {INDEX} does not list; they are read: {_some(unlisted)}"
        )
    return notes


def _some(names: list[str]) -> str:
    return ", ".join(name if len(name) < 100 else f"{name[:97]}..." for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
