"""The files beside the weights that an output takes over: which they are, and which of them are left out, and why.

Code is among them only where it belongs to the tokenizer or a processor: what their configurations name, and what that
imports from beside it. It is copied and never run. Files that links take from outside the folder are nobody's to copy.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "LICENSE*", "LICENCE*", "NOTICE*")
"""Patterns of everything that may be carried over to an output, beside the code of a tokenizer."""
ADAPTER = "adapter_config.json"

_TEMPLATES = "additional_chat_templates"
_NAMING = (
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Configurations that name code in their `auto_map`."""
_OF_TOKENIZER = re.compile(r"Auto(Tokenizer|\w*Processor|FeatureExtractor)")
_REFERENCE = re.compile(r"(?:(?P<repository>[^-]\S*?)--)?(?P<module>\w+)\.\w+")
_IMPORT = re.compile(r"^\s*(?:import\s+\.(\w+)|from\s+\.(\w+)\s+import)", re.MULTILINE)
"""As transformers finds what a module needs from beside it."""
_LARGEST_CODE = 1 << 22


@dataclasses.dataclass(frozen=True)
class SideFiles:
    """What is beside the weights."""

    kept: tuple[Path, ...]
    """To be taken over, in the order of their names."""
    left_out: tuple[str, ...]
    """A sentence for each thing that is not, although the model may count on it."""


def find_side_files(folder: Path) -> SideFiles:
    """Tokenizer with its code, generation settings, chat templates, licence, model card.

    Neither weights nor their index, nor config.json, which the output writes itself, nor code of the model.
    """
    kept, left_out = list[Path](), list[str]()
    candidates = [path for path in sorted(folder.iterdir()) if _is_side_file(path.name)]
    candidates += sorted((folder / _TEMPLATES).glob("*.jinja"))
    for path in candidates:
        if path.name == ADAPTER:
            left_out.append(
                f"{ADAPTER} and the adapter that it describes are left out: the output is of the weights without it; "
                "merge it into them first if it belongs to the model (peft: merge_and_unload, then save_pretrained)"
            )
        elif not path.is_dir():
            _sort(folder, path, kept, left_out)
    here, missing = _tokenizer_code(folder)
    for name in here:
        _sort(folder, folder / name, kept, left_out)
    left_out += (f"{name}, which the tokenizer's code is in, is missing: no tokenizer will load" for name in missing)
    for name, repository in named_code(folder).items():
        if repository is not None:
            left_out.append(
                f"{name}, which the tokenizer's code is in, is of another repository and is not fetched: {repository}"
            )
    return SideFiles(tuple(sorted(kept)), tuple(left_out))


def outside(folder: Path, name: str) -> Path | None:
    """Where links lead from a file of the folder, if that is neither in it nor among the blobs of its Hub cache."""
    try:
        path, root = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return folder / name
    allowed = [root]
    if root.parent.name == "snapshots":  # <cache>/<repository>/snapshots/<commit>
        repository = root.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs"]
    return None if any(path.is_relative_to(place) for place in allowed) else path


def missing_code(folder: Path) -> list[str]:
    """Names of the files of tokenizer code that are called for and not in the folder."""
    return _tokenizer_code(folder)[1]


def foreign_code(folder: Path) -> list[str]:
    """Other repositories from which the tokenizer's code is to come."""
    return [repository for repository in named_code(folder).values() if repository is not None]


def named_code(folder: Path) -> dict[str, str | None]:
    """The files that tokenizer and processors of a folder name as their code, and the other repository, if any."""
    named: dict[str, str | None] = {}
    for name in _NAMING:
        auto_map = _read(folder, name).get("auto_map")
        if not isinstance(auto_map, Mapping):
            auto_map = {"AutoTokenizer": auto_map}  # the format of old
        for kind, references in auto_map.items():
            if _OF_TOKENIZER.fullmatch(kind):
                for reference in references if isinstance(references, list) else [references]:
                    if isinstance(reference, str) and (match := _REFERENCE.fullmatch(reference)):
                        named[f"{match['module']}.py"] = match["repository"]
    return named


def _tokenizer_code(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files with the tokenizer's code, those that it imports too: the ones here, and the missing ones."""
    waiting = [name for name, repository in named_code(folder).items() if repository is None]
    here, missing = set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        if name in here | missing:
            continue
        if not (folder / name).is_file():
            missing.add(name)
            continue
        here.add(name)
        if outside(folder, name) is None:
            waiting += _imports(folder / name)
    return sorted(here), sorted(missing)


def _imports(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        code = file.read(_LARGEST_CODE).decode(errors="replace")
    for groups in _IMPORT.findall(code):
        yield f"{''.join(groups)}.py"


def _sort(folder: Path, path: Path, kept: list[Path], left_out: list[str]) -> None:
    name = path.relative_to(folder).as_posix()
    if (target := outside(folder, name)) is not None:
        left_out.append(
            f"{name} is a link to {target}, outside the folder, and is left out: put the file itself there if the "
            "output is to have it"
        )
    elif path.is_file():
        kept.append(path)
    else:
        left_out.append(f"{name} is left out: it is not a regular file, or a link to nothing")


def _is_side_file(name: str) -> bool:
    return (
        name != CONFIG
        and not name.startswith(".")
        and not name.endswith(".index.json")
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in SMALL_FILES)
    )


def _read(folder: Path, name: str) -> Mapping[str, Any]:
    """A small configuration; nothing where it cannot be read, which whoever loads it will say."""
    path = folder / name
    try:
        if not path.is_file() or outside(folder, name) is not None or path.stat().st_size > _LARGEST_CODE:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
