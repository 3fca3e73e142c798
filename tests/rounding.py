"""What may differ between two computations of the same thing."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_equal_but_for_rounding(found: Tensor, expected: Tensor, units: int = 10) -> None:
    """Within so many units in the last place of the largest entry.

    How a product is rounded depends on the processor, the number of threads and where its factors lie in memory: a
    loaded tensor is a view of its file, a copy begins at a multiple of 64 bytes.
    """
    unit = torch.finfo(expected.dtype).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=units * unit)
