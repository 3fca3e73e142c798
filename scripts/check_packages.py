"""Look into the wheel and the sdist of a folder, and run the wheel's command outside the checkout.

python scripts/check_packages.py dist
"""

from __future__ import annotations

import site
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(folder: str) -> None:
    (wheel,), (sdist,) = Path(folder).resolve().glob("*.whl"), Path(folder).resolve().glob("*.tar.gz")
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "globe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as file:
        check(wheel, package, {name for name in file.namelist() if ".dist-info/" not in name}, exactly=True)
    with tarfile.open(sdist) as file:
        check(sdist, package | {"README.md", "LICENSE"}, {name.split("/", 1)[1] for name in file.getnames()})
    with tempfile.TemporaryDirectory() as scratch:
        run(wheel, Path(scratch))


def check(archive: Path, expected: set[str], found: set[str], exactly: bool = False) -> None:
    """Exit with what an archive lacks or, where it must hold no more, has too much."""
    lacking, foreign = sorted(expected - found), sorted(found - expected) if exactly else []
    if lacking or foreign:
        sys.exit(f"{archive.name} lacks {lacking or 'nothing'} and has {foreign or 'nothing'} that is not in globe/")
    print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB, {len(found)} files")


def run(wheel: Path, scratch: Path) -> None:
    """`globe inspect shipped` from an environment with the wheel; what it depends on is borrowed from this one."""
    venv.create(scratch / "env", with_pip=True)
    python = scratch / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    where = "import site; print(site.getsitepackages()[0])"
    packages = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    borrowed = "".join(f"site.addsitedir({folder!r});" for folder in site.getsitepackages())
    (packages / "borrowed.pth").write_text(f"import site;{borrowed}")  # searched behind the wheel's own
    told = subprocess.run(
        [scratch / "env" / "bin" / "globe", "inspect", "shipped"],
        check=True,
        capture_output=True,
        text=True,
        cwd=scratch,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    ).stdout
    if str(packages.resolve()) not in told or "whole model" not in told:
        sys.exit(f"globe inspect shipped did not look into the wheel's own model:\n{told}")
    print(f"{wheel.name}: globe inspect shipped runs")


if __name__ == "__main__":
    main(*sys.argv[1:])
