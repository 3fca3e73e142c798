"""Truncated SVD is the best approximation within the budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.rivals.truncated_svd import svd_rank, truncated_svd
from globe.errors import SettingsError
from tests.random_experts import normal


def test_error_is_numpys_optimum() -> None:
    experts = normal(3, 6, 10, dtype=torch.float32)
    found = truncated_svd({(0, "gate"): experts}, 0.75, torch.float32)
    rank = svd_rank(6, 10, 0.75)
    assert rank == 2
    for expert, approximation in zip(experts.numpy(), found.stacks[0, "gate"].numpy(), strict=True):
        left_out = np.linalg.svd(expert, compute_uv=False)[rank:]
        assert np.linalg.norm(expert - approximation) == pytest.approx(np.linalg.norm(left_out), rel=1e-5)
        assert np.linalg.matrix_rank(approximation) == rank


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75, 0.99])
def test_budget_is_kept_and_spent(keep: float) -> None:
    experts = normal(4, 12, 30, dtype=torch.float32)
    stored = truncated_svd({(0, "up"): experts}, keep, torch.float32).stored_parameters
    assert stored <= keep * experts.numel() < stored + 4 * (12 + 30)


def test_no_rank_left() -> None:
    with pytest.raises(SettingsError, match="no rank"):
        svd_rank(2, 2, 0.5)
