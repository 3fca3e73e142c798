"""One dimension of gate and up, against indexing."""

from __future__ import annotations

import pytest
import torch

from globe.checkpoint.gate_up import fuse_gate_up, split_gate_up


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("interleaved", [False, True])
def test_they_split_where_the_rule_says_and_fuse_to_the_same(dim: int, interleaved: bool) -> None:
    both = torch.arange(4 * 6 * 8).view(4, 6, 8)
    gate, up = split_gate_up(both, dim, interleaved=interleaved)
    size = both.shape[dim]
    places = range(0, size, 2) if interleaved else range(size // 2)
    assert torch.equal(gate, both.index_select(dim, torch.tensor(places)))
    rest = [place for place in range(size) if place not in places]
    assert torch.equal(up, both.index_select(dim, torch.tensor(rest)))
    assert gate.untyped_storage().data_ptr() == both.untyped_storage().data_ptr()
    assert torch.equal(fuse_gate_up(gate, up, dim, interleaved=interleaved), both)
