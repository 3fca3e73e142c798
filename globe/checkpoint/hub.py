"""Checkpoints on the Hugging Face Hub: small files at once, shards one at a time, headers without their data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # that of httpx or of httpx2, by version
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import tqdm

from globe.checkpoint.side_files import SMALL_FILES, missing_code
from globe.errors import CheckpointError, OutputError

_NO_BAR: Any = functools.partial(tqdm, disable=True)


@dataclasses.dataclass(frozen=True)
class HubRepo:
    """One commit of a repository: a branch that moves on does not change what a run reads."""

    repo_id: str
    """`owner/name`."""
    commit: str
    """Full hash."""
    cache: Path | None = None
    """Folder of the Hub's cache; None: the client's own."""

    def fetch(self, filename: str, folder: Path | None = None, *, quietly: bool = False) -> Path:
        """The file in a folder, or in the Hub's cache, downloaded unless it is there; without a bar if `quietly`."""
        bar = _NO_BAR if quietly else None
        with _explained(self.repo_id, filename):
            return Path(
                hf_hub_download(
                    self.repo_id,
                    filename,
                    revision=self.commit,
                    cache_dir=self.cache,
                    local_dir=folder,
                    tqdm_class=bar,
                )
            )

    def header(self, filename: str) -> dict[str, Any]:
        """The parsed safetensors header of a shard, read without its data."""
        with _explained(self.repo_id, filename):
            metadata = HfApi().parse_safetensors_file_metadata(self.repo_id, filename, revision=self.commit)
        return {name: dataclasses.asdict(tensor) for name, tensor in metadata.tensors.items()}


def open_repo(repo_id: str, revision: str | None, cache: Path | None = None) -> tuple[HubRepo, Path]:
    """The commit that `revision` (by default the main branch) names now, and the folder of its small files.

    The code of the tokenizer is among them, where it has its own; it is not run.
    """
    with _explained(repo_id, revision or "the main branch"):
        small: list[str] = [*SMALL_FILES]
        folder = Path(snapshot_download(repo_id, revision=revision, cache_dir=cache, allow_patterns=small))
        absent = list[str]()
        while (missing := missing_code(folder)) != absent:  # what is fetched may import more
            snapshot_download(repo_id, revision=folder.name, cache_dir=cache, allow_patterns=missing)
            absent = missing
    return HubRepo(repo_id, folder.name, cache), folder


@contextlib.contextmanager
def explained_upload(repo_id: str) -> Iterator[None]:
    """Turn what the client says against an upload into an `OutputError` that says what to do."""
    try:
        yield
    except HFValidationError as error:
        raise OutputError(f"{repo_id!r} is no Hub id, which would be owner/name: {error}") from error
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise OutputError(
            f"{repo_id} cannot be written on the Hub ({reason}): `hf auth login` with a token that may write there, or "
            "check the network, and push again; what arrived is not sent twice"
        ) from error


@contextlib.contextmanager
def _explained(repo_id: str, asked: str) -> Iterator[None]:
    """Turn the client's errors into `CheckpointError`s that say what to do; the cause stays attached."""
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is neither a folder nor a Hub id: {error}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its terms at https://huggingface.co/{repo_id}, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is neither a folder here nor a model on the Hub: check the spelling; "
            "if it is private, `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no revision {asked!r} on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is not a folder here, and {asked} is neither in the Hub's cache nor can it be fetched: {error}"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no file {asked} on the Hub; only safetensors weights are read") from error
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{repo_id}: {asked} is not a valid safetensors file: {error}") from error
    except (OSError, HTTPError) as error:
        raise CheckpointError(
            f"{repo_id}: {asked} cannot be fetched ({type(error).__name__}: {error}); "
            "check the network and the disk, or give a local folder"
        ) from error
