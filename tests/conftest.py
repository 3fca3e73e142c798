"""Settings of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from globe.measure import samples

settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs whole scripts and commands goes first: at the end, one process would wait for the other."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(scope="session", autouse=True)
def _few_samples() -> Iterator[None]:
    """Models calibrate on few and short samples of their own, which take most of the time of a small compression.

    The test of the default run puts the numbers back.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "NUM_SAMPLES", 16)
        patch.setattr(samples, "LENGTH", 16)
        yield
