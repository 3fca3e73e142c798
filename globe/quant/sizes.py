"""Where experts are coded in parts or with widths of their own, and what widths and scales take.

Nothing heavy is imported here: headers alone are to tell what coding needs.
"""

from __future__ import annotations

LONG_ROW = 64
"""Outputs from which rows have widths and scales of their own: a row that feedback makes four times what its expert and
its input suggest would be cut off, and one in a thousand is enough to lose more than sharing saves; see docs/log.md."""
MOST_WEIGHTS = 1 << 27
"""Of experts that are coded at once: memory holds five copies of them. The last digits of what is coded depend on it,
so it is the same on every machine."""


def side_bytes(num_experts: int, num_inputs: int, is_shared: bool) -> int:
    """What `SharedRows` or `OwnRows` of E experts with N inputs take."""
    if is_shared:
        return 4 * num_experts + 3 * num_inputs
    return num_experts * (num_inputs + (num_inputs + 1) // 2 + 2)
