from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.fresh_process import FreshProcess
from tests.model.compressed import BANK_SETS, Compressed, write_compressed

Make = Callable[..., Compressed]


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a compressed checkpoint of a family with the named banks, once in a session; only to be read."""
    made: dict[tuple[str, str, torch.dtype], Compressed] = {}

    def make(model_type: str, banks: str = "shared_and_own", dtype: torch.dtype = torch.float32) -> Compressed:
        key = (model_type, banks, dtype)
        if key not in made:
            folder: Path = tmp_path_factory.mktemp(f"{model_type}_{banks}")
            made[key] = write_compressed(folder, model_type, BANK_SETS[banks], dtype=dtype)
        return made[key]

    return make


@pytest.fixture(scope="session")
def fresh() -> Iterator[FreshProcess]:
    with FreshProcess() as process:
        yield process
