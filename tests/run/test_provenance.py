"""What an output says of where it comes from, and its way to the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open

from globe import CheckpointError, OutputError, compress, export_dense
from globe.checkpoint.card import read_source_card, write_native_card
from globe.checkpoint.manifest import MANIFEST, verify_files
from globe.checkpoint.push import push
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import Report
from globe.cli.main import main
from globe.plan.recipe import RECIPE
from tests.coded import ALONE, write_source
from tests.hub import COMMIT, running_hub

CARD = """---
license: other
license_name: their-licence
license_link: LICENSE
language: [en, de]
tags: [chat, globe]
base_model: their/base
extra_gated_prompt: no
---
# Theirs

They made it.
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("provenance") / "source"
    write_source(folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def native(source: Path) -> Path:
    compress(source, source.with_name("native"), ALONE)
    return source.with_name("native")


@pytest.fixture(scope="module")
def dense(native: Path) -> Path:
    return export_dense(native, native.with_name("dense"))


def test_the_cards_keep_the_licence_and_the_card_of_the_source(native: Path, dense: Path) -> None:
    for folder, tag in ((native, "compressed"), (dense, "lossy-dense-export")):
        verify_files(folder)
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "other"
        assert card.data["license_name"] == "their-licence"
        assert card.data.language == ["en", "de"]
        assert card.data.library_name == "transformers"
        assert card.data.tags == ["globe", "mixture-of-experts", tag, "chat"]
        assert "base_model" not in card.data.to_dict()  # a folder here is nothing on the Hub
        assert "extra_gated_prompt" not in card.data
        own, _, theirs = card.text.partition("## The source's card")
        assert "They made it." not in own
        assert theirs.strip().endswith("# Theirs\n\nThey made it.")
        assert "bits a weight" in own
        recipe = yaml.safe_load(own.partition("```yaml\n")[2].partition("```")[0])
        assert recipe == yaml.safe_load((native / RECIPE).read_text())
        assert recipe["bits"] == 3
        assert str(native.parent) not in own.partition("## Recipe")[0]
    assert "A lossy copy of source" in (dense / "README.md").read_text()


def test_a_dense_export_says_to_programs_that_it_is_lossy_and_of_what(source: Path, native: Path, dense: Path) -> None:
    said = json.loads((dense / "config.json").read_text())["globe_export"]
    report = Report.read(native)
    assert said["lossy"] is True
    assert said["source"] == "source"
    assert said["source_fingerprint"] == report.fingerprint == open_checkpoint(source).fingerprint()
    assert said["bits_per_expert_weight"] == report.bits
    shards = sorted(dense.glob("*.safetensors"))
    assert len(shards) == len(list(source.glob("*.safetensors")))
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert json.loads(file.metadata()["globe_export"]) == said
            assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("card", ["none", "---\n[x\n---\ntext", "---\n- x\n---\ntext", "---\nlicense: [1]\n---\nx"])
def test_a_card_that_is_none_is_kept_as_it_is(source: Path, native: Path, tmp_path: Path, card: str) -> None:
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(card)
    theirs = read_source_card(open_checkpoint(tmp_path / "source"))
    found = ModelCard(write_native_card(Report.read(native), theirs, "a: b").decode())
    assert found.data.license is None
    assert found.text.rstrip().endswith(card.rpartition("\n")[2])


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
def test_a_model_of_the_hub_is_named_with_its_commit_and_goes_back_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "served")
    with running_hub(tmp_path / "served", tmp_path / "cache", monkeypatch) as hub:
        report = compress("owner/name", tmp_path / "out", ALONE, revision="main", cache=tmp_path / "own")
        assert report.commit == COMMIT
        hub.log.clear()
        assert main(["inspect", "owner/name", "--bits", "3", "--revision", "main"]) == 0
        assert "of it downloaded" in capsys.readouterr().out
        assert not [name for name in hub.downloads() if name.endswith(".safetensors")]
        assert (tmp_path / "own" / "models--owner--name").is_dir()
        with pytest.raises(CheckpointError, match="no revision 'v9'"):
            compress("owner/name", tmp_path / "never", ALONE, revision="v9")
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.base_model == "owner/name"
        assert card.data["base_model_relation"] == "quantized"
        assert COMMIT in card.text
        recipe = yaml.safe_load((tmp_path / "out" / RECIPE).read_text())
        assert (recipe["model"], recipe["revision"]) == ("owner/name", COMMIT)
        export_dense(tmp_path / "out", tmp_path / "dense")
        assert ModelCard.load(tmp_path / "dense" / "README.md").data.base_model == "owner/name"

        (tmp_path / "out" / "README.md").write_text(f"{card.content}\nMore.\n")
        (tmp_path / "out" / "diary.txt").write_text("mine")
        assert main(["push", str(tmp_path / "out"), "owner/name", "--private", "--revision", "branch"]) == 0
        assert "not pushed: diary.txt" in capsys.readouterr().out
        served = tmp_path / "served"
        stale = {path.name for path in source.glob("*.safetensors")} - {p.name for p in (tmp_path / "out").iterdir()}
        assert not any((served / name).exists() for name in stale)
        assert not (served / "diary.txt").exists()
        assert (served / "README.md").read_text().endswith("More.\n")
        verify_files(served)
        assert ("/api/repos/create", {"name": "name", "organization": "owner", "visibility": "private"}) in hub.posts
        assert "/api/models/owner/name/branch/branch" in [path for path, _ in hub.posts]
        assert "/api/models/owner/name/commit/branch" in [path for path, _ in hub.posts]


def test_nothing_is_pushed_that_is_not_as_it_was_written(
    source: Path, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(source, tmp_path / "cache", monkeypatch) as hub:
        with pytest.raises(CheckpointError, match=f"no {MANIFEST}"):
            push(source, "owner/name")
        copy = shutil.copytree(native, tmp_path / "copy")
        (copy / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"changed since it was written: config\.json"):
            push(copy, "owner/name")
        with pytest.raises(OutputError, match="no Hub id"):
            push(native, "not an id")
        assert hub.posts == []
        with pytest.raises(OutputError, match=r"gated/name cannot be written on the Hub .*hf auth login"):
            push(native, "gated/name")
