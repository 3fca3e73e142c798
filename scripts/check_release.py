"""What of a release a look at the files tells: one version everywhere, a dated heading for it, and a clean checkout.

python scripts/check_release.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Exit with everything that is in the way, or say nothing."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    faults: list[str] = []
    if f"\nversion: {version}\n" not in (ROOT / "CITATION.cff").read_text():
        faults.append(f"CITATION.cff has another version than pyproject.toml, {version}")
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.M):
        faults.append(f"CHANGELOG.md has no heading '## {version} (YEAR-MONTH-DAY)'")
    if ".dev" in version:
        faults.append(f"{version} is a version of work under way")
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, check=True, capture_output=True, text=True)
    if changed.stdout:
        faults.append(f"the checkout is not clean:\n{changed.stdout.rstrip()}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
