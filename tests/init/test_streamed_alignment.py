from __future__ import annotations

import pytest
import torch
from torch import Tensor

from globe.bank.factors import mix
from globe.bank.linalg import polar
from globe.init.streamed_alignment import align_pass, sketch
from globe.init.subspaces import left_gram_rows
from tests.random_experts import F64, normal

P, D, M = 5, 14, 4
SIZES = (3, 6, 2)
SLICES = [slice(0, 3), slice(3, 9), slice(9, 11)]
WEIGHTS = normal(11, P, D)


def read(index: int) -> Tensor:
    return WEIGHTS[SLICES[index]]


@pytest.mark.parametrize("rank", [3, P])
def test_the_sketch_is_random_mixtures_of_the_experts_in_their_first_frames(rank: int):
    bases, energy = sketch(read, SLICES, rank, M, seed=7)
    draws = torch.randn(11, M, generator=torch.Generator().manual_seed(7)).double()
    aligned = WEIGHTS if rank == P else left_gram_rows(WEIGHTS, rank)
    torch.testing.assert_close(bases, torch.einsum("em,erd->mrd", draws, aligned))
    assert energy == pytest.approx(float(WEIGHTS.square().sum()))
    assert not torch.allclose(sketch(read, SLICES, rank, M, seed=8)[0], bases)


@pytest.mark.parametrize("rank", [3, P])
@pytest.mark.parametrize("first", [True, False])
def test_a_pass_is_frames_then_codes_then_bank(rank: int, first: bool):
    """Against all experts at once; codes and bank are known up to a change of basis, their mixtures are not."""
    codes, bases = normal(11, M, seed=1), normal(M, rank, D, seed=2) * torch.logspace(-1, 1, M).double()[:, None, None]
    if not first:
        frames = polar(WEIGHTS @ mix(codes, bases).mT)
        aligned = frames.mT @ WEIGHTS
    else:
        aligned = WEIGHTS if rank == P else left_gram_rows(WEIGHTS, rank)
    span = torch.linalg.qr(bases.flatten(1).mT)[0]
    projected = aligned.flatten(1) @ span
    missed = WEIGHTS.square().sum() - projected.square().sum()
    columns = torch.linalg.qr(projected)[0]
    mixed = (columns @ columns.mT @ aligned.flatten(1)).view_as(aligned)

    found_codes, found_bases, found_missed = align_pass(read, SLICES, rank, None if first else codes, bases.clone())
    assert found_missed == pytest.approx(float(missed), rel=1e-9)
    torch.testing.assert_close(mix(found_codes, found_bases), mixed, rtol=1e-6, atol=1e-7)
    assert found_codes.dtype == F64
