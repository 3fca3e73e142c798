"""`python -m globe.cli`, the same as `globe`."""

from __future__ import annotations

import sys

from globe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
