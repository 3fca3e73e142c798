from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from globe.checkpoint.side_files import find_side_files

TOKENIZER = "from transformers import PreTrainedTokenizer\nfrom .words import split\n"


def write_tokenizer(folder: Path, reference: object = ("tok.Tok", None), name: str = "tokenizer_config.json") -> None:
    (folder / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": reference}}))
    (folder / "tok.py").write_text(TOKENIZER)
    (folder / "words.py").write_text("    import .letters\nimport os\nfrom . import letters\n")
    (folder / "letters.py").write_text("")
    (folder / "modeling_x.py").write_text("")
    (folder / "tokenization_old.py").write_text("")


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_side_files(folder).kept]


@pytest.mark.parametrize("reference", [("tok.Tok", None), (None, "tok.Tok"), "tok.Tok"])
def test_the_code_of_the_tokenizer_is_kept_with_what_it_imports(tmp_path: Path, reference: object) -> None:
    write_tokenizer(tmp_path, reference)
    assert names(tmp_path) == ["letters.py", "tok.py", "tokenizer_config.json", "words.py"]
    assert find_side_files(tmp_path).left_out == ()


@pytest.mark.parametrize(
    "name", ["processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"]
)
def test_so_is_that_of_processors(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoImageProcessor": "image.P", "AutoProcessor": "proc.P"}}))
    for code in ("image.py", "proc.py", "other.py"):
        (tmp_path / code).write_text("")
    assert names(tmp_path) == sorted(["image.py", "proc.py", name])


def test_the_format_of_old_is_understood(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": ["tok.Tok", null]}')
    assert "tok.py" in names(tmp_path)


def test_code_of_the_model_is_not_kept_though_the_tokenizer_names_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    auto_map = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    (tmp_path / "configuration_x.py").write_text("")
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"auto_map": auto_map}))
    assert names(tmp_path) == ["tokenizer_config.json"]


@pytest.mark.parametrize(
    "reference", ["../tok.Tok", "/etc/tok.Tok", "sub/tok.Tok", "a.b.c", 3, ["x"], {"a": "tok.Tok"}]
)
def test_a_reference_is_the_name_of_a_module(tmp_path: Path, reference: object) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "tok.py").write_text("")
    write_tokenizer(tmp_path / "model", reference)
    assert names(tmp_path / "model") == ["tokenizer_config.json"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"auto_map": 3}', "[" * 100_000, "\ud800"])
def test_a_tokenizer_configuration_that_cannot_be_read_names_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert names(tmp_path) == ["tokenizer_config.json"]


def test_missing_code_and_code_elsewhere_are_told(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ("owner/other--elsewhere.Tok", "tok.Tok"))
    (tmp_path / "letters.py").unlink()
    elsewhere = (
        "elsewhere.py, which the tokenizer's code is in, is of another repository and is not fetched: owner/other"
    )
    told = find_side_files(tmp_path).left_out
    assert told == ("letters.py, which the tokenizer's code is in, is missing: no tokenizer will load", elsewhere)


def test_an_adapter_is_left_out_and_how_to_merge_it_told(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert names(tmp_path) == ["tokenizer.json"]
    (told,) = find_side_files(tmp_path).left_out
    assert "merge_and_unload" in told


def test_links_are_followed_within_the_folder_only(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    outside.mkdir()
    (outside / "key.txt").write_text("secret")
    (outside / "tool.jinja").write_text("secret")
    (folder / "merges-v2.txt").write_text("x")
    (folder / "merges.txt").symlink_to("merges-v2.txt")
    for name, target in {
        "LICENSE": outside / "key.txt",
        "NOTICE": Path("../secret/key.txt"),
        "README.md": folder / "NOTICE",
        "vocab.txt": Path("nothing"),
        "loop.json": Path("loop.json"),
        "zero.json": Path("/dev/zero"),
        "additional_chat_templates": outside,
        "tok.py": outside / "key.txt",
    }.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.json")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tok.Tok", null]}}')
    assert names(folder) == ["merges-v2.txt", "merges.txt", "tokenizer_config.json"]
    left_out = [told.split(" is ")[0] for told in find_side_files(folder).left_out]
    dropped = ["LICENSE", "NOTICE", "README.md", "loop.json", "pipe.json", "vocab.txt", "zero.json"]
    assert left_out == [*dropped, "additional_chat_templates/tool.jinja", "tok.py"]


def test_a_folder_that_is_itself_a_link_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "LICENSE").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert names(tmp_path / "link") == ["LICENSE"]


def test_the_links_of_a_hub_cache_are_followed_into_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "blobs").mkdir()
    (tmp_path / "models--owner--name" / "blobs" / "4567").write_text("x")
    (tmp_path / "models--owner--name" / "refs").write_text("x")
    (snapshot / "LICENSE").symlink_to("../../blobs/4567")
    (snapshot / "NOTICE").symlink_to("../../refs")
    assert names(snapshot) == ["LICENSE"]
