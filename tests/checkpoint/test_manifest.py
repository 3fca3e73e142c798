from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from globe.checkpoint import manifest as manifest_module
from globe.checkpoint import writer as writer_module
from globe.checkpoint.digest import file_sha256
from globe.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    list_documents,
    read_manifest,
    verify_files,
    verify_model,
    write_listed,
    write_manifest,
)
from globe.errors import CheckpointError

CONTENT = {
    "config.json": b"{}\n",
    "model.safetensors": bytes(range(256)),
    "templates/chat.jinja": b"{{ x }}",
    "README.md": b"#",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, Manifest("run", {name: file_sha256(folder / name) for name in CONTENT}))
    return folder


def test_what_was_written_is_verified(folder: Path) -> None:
    found = verify_files(folder)
    assert (found.run, found.num_files, found.num_bytes) == ("run", 4, sum(map(len, CONTENT.values())))
    assert found.unlisted == ()
    assert verify_model(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(name=st.sampled_from([*CONTENT, MANIFEST]), place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(folder: Path, name: str, place: int, bit: int) -> None:
    path = folder / name
    original = bytearray(path.read_bytes())
    flipped = original.copy()
    flipped[place % len(flipped)] ^= 1 << bit
    path.write_bytes(flipped)
    try:
        with pytest.raises(
            CheckpointError,
            match=r"manifest|missing|changed" if name == MANIFEST else f"changed since it was written: {name}",
        ):
            verify_files(folder)
    finally:
        path.write_bytes(original)
    verify_files(folder)


def test_what_is_missing_or_of_another_run_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"missing: config.json; not of this run: extra.safetensors"):
        verify_files(folder)


def test_notes_beside_a_model_are_no_damage(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / ".gitattributes").write_text("")
    assert verify_files(folder).unlisted == ("notes.txt",)


def test_a_changed_card_does_not_change_the_model(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine")
    assert verify_model(folder)
    with pytest.raises(CheckpointError, match=r"README\.md"):
        verify_files(folder)


def test_a_folder_without_a_manifest_proves_nothing(tmp_path: Path) -> None:
    assert not verify_model(tmp_path)
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify_files(tmp_path)
    write_listed(tmp_path, "report.html", b"page")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_file_that_comes_later_is_listed(folder: Path) -> None:
    for page in (b"page", b"another"):
        write_listed(folder, "report.html", page)
        assert (folder / "report.html").read_bytes() == page
        assert verify_files(folder).num_files == 5


def test_a_kill_at_any_write_of_a_listed_file_leaves_what_verifies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, last = manifest_module.write_file, 0, 0

    def write_or_die(path: Path, content: bytes) -> str:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return real(path, content)

    monkeypatch.setattr(writer_module, "write_file", write_or_die)
    monkeypatch.setattr(manifest_module, "write_file", write_or_die)
    for kill in (1, 2, 3):
        last = 0
        write_listed(folder, "report.html", b"page")
        calls, last = 0, kill
        with pytest.raises(KeyboardInterrupt):
            write_listed(folder, "report.html", b"another")
        assert verify_files(folder).unlisted in ((), ("report.html",))


def test_edited_documents_are_listed_as_they_are_and_removed_ones_no_more(folder: Path) -> None:
    write_listed(folder, "report.html", b"page")
    (folder / "README.md").write_text("# Mine")
    (folder / "report.html").unlink()
    list_documents(folder)
    assert verify_files(folder).num_files == 4
    (folder / "config.json").write_text("{}")
    list_documents(folder)
    with pytest.raises(CheckpointError, match=r"changed since it was written: config\.json"):
        verify_files(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a\\b", "", 7])
def test_a_manifest_leads_nowhere_else(folder: Path, name: object) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["files"] = {str(name) if not isinstance(name, str) else name: "0" * 64} if name != 7 else {"x": 7}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    with pytest.raises(CheckpointError, match="is not as it was written"):
        read_manifest(folder)


def test_what_is_no_regular_file_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"missing: config.json"):
        verify_files(folder)
