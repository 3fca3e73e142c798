"""The kernel for GPUs, in Triton's interpreter, against decoding to float64 and multiplying."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from globe.quant import packing
from globe.quant.coded import CodedExperts
from tests.quant.test_product import COUNTS, TOLERANCE, N, random_experts, tokens


def agrees(coded: CodedExperts, x: Tensor, counts: list[int]) -> bool:
    """Whether products are those with decoded experts, and rows of no expert are left as they were."""
    from globe.quant.triton_product import multiply

    rows = coded.rows()
    each = (part.flatten() for part in (rows.offsets, rows.widths, rows.steps))
    decoded = packing.decode(coded.payload, *each, coded.length).view(*rows.widths.shape, -1).double()
    out = torch.full((len(x), coded.num_outputs), 7.0)
    multiply(x, torch.tensor(counts).cumsum(0), coded, out)
    pieces = x.double().split([*counts, len(x) - sum(counts)])
    wanted = [piece @ X[:, : coded.num_outputs] for piece, X in zip(pieces, decoded, strict=False)]
    error = (out[: sum(counts)].double() - torch.cat(wanted)).norm() / torch.cat(wanted).norm().clamp_min(1e-30)
    return bool(error <= TOLERANCE[x.dtype]) and bool((out[sum(counts) :] == 7).all())


def check() -> None:
    """Run where TRITON_INTERPRET is 1; there bfloat16 is multiplied as the integers that it is stored in (3.9)."""
    for K, form in itertools.product((5, 12, 131), ({"shared": True}, {"width": 2}, {"width": 3}, {"width": 16}, {})):
        assert agrees(random_experts(K, **form), tokens()[0], COUNTS), (K, form)
    assert agrees(random_experts(29), tokens(torch.float16)[0], COUNTS)
    many = torch.randn(300, N, generator=torch.Generator().manual_seed(2))
    assert agrees(random_experts(48), many, [0, 150, 0, 1, 149, 0, 0])
    assert agrees(random_experts(48), many[:1], [0, 0, 0, 1, 0, 0, 0])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_it_is_what_decoded_experts_give() -> None:
    code = "from tests.quant.test_triton_product import check; check()"
    settings = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=settings, cwd=Path(__file__).parents[2], check=True)
