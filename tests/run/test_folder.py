from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from globe import compress
from globe.checkpoint.manifest import MANIFEST, verify_files
from globe.checkpoint.writer import write_file, write_json
from globe.errors import FinishedError, OutputError, SettingsError
from globe.run.folder import UNFINISHED, RunFolder, check_output, is_written, open_run

RUN = {"command": "test", "config": {"steps": 5, "layers": (1, 2)}}
OTHER = {"command": "test", "config": {"steps": 6, "layers": (1, 2)}}


def fill(folder: RunFolder) -> None:
    (folder.path / "templates").mkdir(exist_ok=True)
    names = ("model.safetensors", "templates/chat.jinja", "config.json")
    folder.complete({name: write_file(folder.path / name, name.encode()) for name in names})


def make(output: Path, run: dict[str, Any] = RUN, **settings: Any) -> Path:
    with open_run(output, run, **settings) as folder:
        if not folder.whole():
            fill(folder)
        folder.publish()
    return folder.output


class Killed(BaseException):
    pass


def leave(output: Path, run: dict[str, Any] = RUN, *, finished: bool = True, whole: bool = False) -> Path:
    """A run that was killed at work."""
    with pytest.raises(Killed), open_run(output, run) as folder:  # noqa: PT012
        write_file(folder.path / "model-1.safetensors", b"x")
        if finished:
            folder.records.write("scope-00000", {"files": {}})
        if whole:
            fill(folder)
        raise Killed
    return folder.path


def test_an_output_is_built_beside_its_name_and_moved_there(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "out"
    with open_run(output, RUN) as folder:
        assert folder.path == tmp_path / "runs" / "out.partial"
        (folder.path / "model.safetensors.tmp").write_bytes(b"of a write that was killed")
        (folder.path / "stray.safetensors").write_bytes(b"of a plan that was made anew")
        fill(folder)
        assert not output.exists()
        folder.publish()
    assert {path.name for path in output.iterdir()} == {"model.safetensors", "templates", "config.json", MANIFEST}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["out"]
    verify_files(output)


@pytest.mark.parametrize("place", ["link", "dangling", "empty", "new", "home"])
def test_links_are_followed_and_empty_folders_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "link").symlink_to(disk)
    (tmp_path / "dangling").symlink_to(disk / "later")
    (tmp_path / "empty").mkdir()
    output = Path("~/home") if place == "home" else tmp_path / place
    found = make(output)
    assert found == {"link": disk, "dangling": disk / "later"}.get(place, tmp_path / place)
    assert (tmp_path / "link").is_symlink()
    verify_files(output.expanduser())
    assert not list(tmp_path.rglob("*.partial"))


def test_the_working_directory_stays_and_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    make(Path())
    assert tmp_path.stat().st_ino == inode
    verify_files(tmp_path)
    assert not (tmp_path / ".partial").exists()
    with pytest.raises(OutputError, match="not empty"):
        make(Path())


def test_files_are_moved_one_by_one_and_a_kill_between_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    real, moved = Path.replace, list[str]()

    def replace(path: Path, target: Path) -> Path:
        if path.parent.name == ".partial" and not path.name.endswith(".tmp"):
            moved.append(path.name)
            if len(moved) == 2:
                raise Killed
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):
            make(Path())
    assert not (tmp_path / "config.json").exists()  # nothing loads what is not whole
    with pytest.raises(OutputError, match="not empty"):
        make(tmp_path, OTHER)
    make(Path())
    verify_files(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_a_killed_run_is_gone_on_with(tmp_path: Path, whole: bool) -> None:
    partial = leave(tmp_path / "out", whole=whole)
    with open_run(tmp_path / "out", RUN) as folder:
        assert folder.whole() == whole
        assert folder.records.read("scope-00000") == {"files": {}}
        if not whole:
            fill(folder)
        folder.publish()
    assert not partial.exists()
    verify_files(tmp_path / "out")


def test_what_was_whole_and_is_damaged_is_not_given_its_name(tmp_path: Path) -> None:
    partial = leave(tmp_path / "out", whole=True)
    (partial / "model.safetensors").write_bytes(b"MODEL.safetensors")
    with open_run(tmp_path / "out", RUN) as folder:
        assert not folder.whole()
    make(tmp_path / "out")
    verify_files(tmp_path / "out")


def test_a_kill_between_the_name_and_the_end_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("globe.run.folder.shutil.rmtree", kill)
        with pytest.raises(Killed):
            make(tmp_path / "out")
    assert (tmp_path / "out" / UNFINISHED).is_dir()
    with pytest.raises(OutputError, match="exists and is not empty"):
        make(tmp_path / "out", OTHER)
    make(tmp_path / "out")
    assert not (tmp_path / "out" / UNFINISHED).exists()
    verify_files(tmp_path / "out")


def test_a_name_that_is_taken_meanwhile_costs_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with open_run(output, RUN) as folder:
        fill(folder)
        output.mkdir()
        (output / "precious").write_text("x")
        with pytest.raises(OutputError, match=r"whole in .*out.partial but cannot get its name") as fault:
            folder.publish()
    assert "run the same command again" in str(fault.value)
    (output / "precious").unlink()
    with open_run(output, RUN) as folder:
        assert folder.whole()
        folder.publish()
    verify_files(output)


def test_a_run_that_finished_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    leave(tmp_path / "out", finished=False)
    with open_run(tmp_path / "out", OTHER) as folder:
        assert not (folder.path / "model-1.safetensors").exists()


def test_a_finished_part_is_not_lost_to_other_settings(tmp_path: Path) -> None:
    partial = leave(tmp_path / "out")
    with (
        pytest.raises(SettingsError, match=r"1 finished parts .*steps was 5, now 6.*--overwrite"),
        open_run(tmp_path / "out", OTHER),
    ):
        pass
    assert (partial / "model-1.safetensors").exists()
    with open_run(tmp_path / "out", OTHER, overwrite=True) as folder:
        assert not (partial / "model-1.safetensors").exists()
        assert folder.records.read("scope-00000") is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"run": 1}', b"[" * 10_000])
def test_damaged_settings_lose_nothing(tmp_path: Path, content: bytes) -> None:
    partial = leave(tmp_path / "out")
    (partial / UNFINISHED / "run.json").write_bytes(content)
    with open_run(tmp_path / "out", RUN) as folder:
        assert folder.records.read("scope-00000") == {"files": {}}
    (partial / UNFINISHED / "run.json").write_bytes(content)
    with pytest.raises(SettingsError, match="1 finished parts"), open_run(tmp_path / "out", OTHER):
        pass


def test_every_flipped_bit_of_a_record_is_found(tmp_path: Path) -> None:
    partial = leave(tmp_path / "out")
    path = partial / UNFINISHED / "scope-00000.json"
    original = path.read_bytes()
    with open_run(tmp_path / "out", RUN) as folder:
        for place in range(len(original)):
            if chr(original[place]) in " \n":
                continue  # JSON does not tell them apart
            flipped = bytearray(original)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            assert folder.records.read("scope-00000") is None, place
        path.write_bytes(original)
        assert folder.records.read("scope-00000") == {"files": {}}


def test_what_no_run_can_write_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    check_output(make(tmp_path / "out"))  # perhaps of the very run that is asked for
    assert is_written(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    assert not is_written(tmp_path / "thesis")
    with pytest.raises(OutputError, match="exists and is not empty"):
        check_output(tmp_path / "thesis")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "thesis" / "thesis.tex")
    with pytest.raises(OutputError, match="exists and is not empty"):
        compress(tmp_path / "no model", tmp_path / "thesis")


def test_a_finished_output_stays_unless_it_may_go(tmp_path: Path) -> None:
    output = make(tmp_path / "out")
    before = (output / MANIFEST).read_bytes()
    with pytest.raises(OutputError, match="exists and is not empty"):
        make(output, OTHER)
    assert (output / MANIFEST).read_bytes() == before
    make(output, OTHER, overwrite=True)
    assert (output / MANIFEST).read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_outputs_of_globe_may_be_replaced_and_not_the_source(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="exists and is not empty"):
        make(tmp_path / "thesis", overwrite=True)
    output = make(tmp_path / "out")
    with pytest.raises(OutputError, match="the model that is read"):
        make(output, OTHER, overwrite=True, source=output)
    verify_files(output)


def test_a_folder_of_that_name_with_other_things_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="not of an unfinished run"):
        make(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["file", "file/below", "loop"])
def test_a_place_that_cannot_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match=r"is a file|cannot be written|leads nowhere"):
        make(tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


HOLD = """
import sys, time
from pathlib import Path
from globe.run.folder import open_run
with open_run(Path(sys.argv[1]), {"command": "test"}):
    print("at work", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "at work\n"
        with pytest.raises(OutputError, match=rf"being written by another run \(process {holder.pid} on "):
            make(tmp_path / "out")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        make(tmp_path / "out")
    verify_files(tmp_path / "out")


def test_the_holder_need_not_say_who_it_is(tmp_path: Path) -> None:
    with open_run(tmp_path / "out", RUN) as folder:
        for content in ("", "[]", json.dumps({"process": "x"})):
            folder.file("holder.json").write_text(content)
            with (
                pytest.raises(OutputError, match=re.escape("another run (it does not say which)")),
                open_run(tmp_path / "out", RUN),
            ):
                pass


def test_a_folder_that_vanishes_during_the_run_is_not_made_again(tmp_path: Path) -> None:
    with open_run(tmp_path / "out", RUN) as folder:
        shutil.rmtree(folder.path)
        with pytest.raises(OutputError, match="cannot be written"):
            write_json(folder.path / "config.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_given_again_when_it_is_done_has_nothing_to_do(tmp_path: Path) -> None:
    make(tmp_path / "out")
    before = (tmp_path / "out" / MANIFEST).stat()
    with pytest.raises(FinishedError, match="this very run has written it"):
        make(tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST).stat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
