"""The types that llama.cpp stores a tensor in: what they take, and what rounding to them loses."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class GgmlType:
    """A type of ggml's."""

    name: str
    block: int
    """Consecutive inputs of an output that are stored together."""
    num_bytes: int
    """Of a block."""
    noise: float
    """Squared error of rounding normal weights over their squares, both summed with weights that are exponentially
    distributed over inputs and known to the quantiser (`tests/servers/ggml_noise.py`)."""

    def stored(self, num_weights: int) -> int:
        """Bytes of whole blocks."""
        return num_weights // self.block * self.num_bytes


_TYPES = (
    GgmlType("iq2_xxs", 256, 66, 0.0937),
    GgmlType("iq2_xs", 256, 74, 0.0673),
    GgmlType("iq2_s", 256, 82, 0.0517),
    GgmlType("iq3_xxs", 256, 98, 0.0233),
    GgmlType("iq3_s", 256, 110, 0.0144),
    GgmlType("iq4_xs", 256, 136, 0.00518),
    GgmlType("iq4_nl", 32, 18, 0.00507),
    GgmlType("q4_K", 256, 144, 0.00434),
    GgmlType("q4_1", 32, 20, 0.00422),
    GgmlType("q5_0", 32, 22, 0.00150),
    GgmlType("q5_K", 256, 176, 0.00112),
    GgmlType("q5_1", 32, 24, 0.000988),
    GgmlType("q6_K", 256, 210, 0.000267),
    GgmlType("q8_0", 32, 34, 0.0000285),
)
"""In ascending size. Types that take no fewer bytes than a better one are left out."""


def types_for(num_inputs: int) -> tuple[GgmlType, ...]:
    """Those whose blocks divide the inputs, in ascending size and with falling noise."""
    fitting = [each for each in _TYPES if num_inputs % each.block == 0]
    return tuple(each for each in fitting if not any(_beats(other, each) for other in fitting))


def _beats(one: GgmlType, other: GgmlType) -> bool:
    """Whether one loses less than another and takes no more."""
    return one.noise < other.noise and one.num_bytes * other.block <= other.num_bytes * one.block
