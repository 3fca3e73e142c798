"""A finished folder put on the Hub: verified, then all that its manifest lists and nothing else."""

from __future__ import annotations

import glob
from pathlib import Path

from huggingface_hub import HfApi

from globe.checkpoint.hub import explained_upload
from globe.checkpoint.manifest import MANIFEST, list_documents, read_manifest, verify_files, verify_model
from globe.errors import CheckpointError

_WEIGHTS = ["model-?????-of-?????.safetensors", "model.safetensors", "model.safetensors.index.json"]
"""What an earlier model in the same place leaves, and whoever loads this one would take for a part of it."""


def push(folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> tuple[str, ...]:
    """Upload a folder that GloBE wrote to the repository `repo_id` on the Hub, which is made if it is not there.

    The model's files are verified first; documents beside them, such as an edited card, are listed as they are. Weights
    of another model under the names of this one's are removed from the branch. An upload that was interrupted goes on
    when it is repeated.

    Args:
        folder: of a compressed model or a dense export.
        repo_id: `owner/name`.
        private: whether a repository that is made can be seen by its owner only.
        revision: branch, made from the main one if it is not there; None: the main one.

    Returns the address of the commit, and the names of files in the folder that are not in its manifest and stay here.

    Raises `CheckpointError` for a folder without a manifest or with changed files, and `OutputError` with what the Hub
    says against it.
    """
    folder = Path(folder)
    if not verify_model(folder):
        raise CheckpointError(f"{folder} has no {MANIFEST}: only what GloBE's commands wrote is pushed")
    list_documents(folder)
    unlisted = verify_files(folder).unlisted
    manifest = read_manifest(folder)
    assert manifest is not None
    api = HfApi()
    with explained_upload(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=f"Upload run {manifest.run} of GloBE",
            allow_patterns=[glob.escape(name) for name in (*manifest.files, MANIFEST)],
            delete_patterns=_WEIGHTS,
        )
    return commit.commit_url, *unlisted
