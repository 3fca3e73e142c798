"""Experts as compressed-tensors stores them, pack-quantized: what fits, and the section of config.json.

A server fuses the experts of a layer, and wants one scheme for all of them and for gate, up and down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from globe.bank_shape import ExpertSizes, sides
from globe.terms import FAMILIES

Scheme = tuple[int, int]
"""Bits of a number, and numbers of a row under one scale."""
WIDTHS = (4, 8)
"""Bits that others have kernels for."""
LARGEST_GROUP = 128
_FORMAT = "pack-quantized"


def group_size(sizes: ExpertSizes) -> int:
    """Numbers under one scale: 128, or the largest part of that which divides the inputs of all families."""
    return math.gcd(LARGEST_GROUP, sizes.intermediate_size, sizes.hidden_size)


def layer_bytes(sizes: ExpertSizes, bits: int) -> int:
    """Of all that is stored of a layer's experts: numbers, scales of two bytes each, and shapes."""
    scheme, matrices = (bits, group_size(sizes)), (sides(sizes, family) for family in FAMILIES)
    return sizes.num_experts * sum(_matrix_bytes(outputs, inputs, scheme) for inputs, outputs in matrices)


def _matrix_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    bits, size = scheme
    return rows * columns * bits // 8 + 2 * rows * columns // size + 16


def group_notes(layers: Iterable[ExpertSizes]) -> list[str]:
    """What to tell of groups that are smaller than usual."""
    sizes = {(layer.intermediate_size, layer.hidden_size): group_size(layer) for layer in layers}
    return [
        f"scales are for {size} inputs each, not {LARGEST_GROUP}, which do not divide experts of {P} x {D}"
        + ("; vLLM's kernels for GPUs take no fewer than 32" if size < 32 else "")
        for (P, D), size in sizes.items()
        if size < LARGEST_GROUP
    ]


def quantization_section(schemes: Mapping[Scheme, Sequence[str]]) -> dict[str, Any]:
    """The `quantization_config` of a model whose experts under these prefixes (model.layers.0.mlp.experts) are packed.

    All else stays as it is, for nothing else is a target.
    """
    groups = {
        f"group_{number}": {
            "targets": [rf"re:{re.escape(prefix)}\.\d+\..*" for prefix in prefixes],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": size,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": _FORMAT,
        }
        # the widest first: transformers reads all experts by the first group, and stops where that has too many bits
        for number, ((bits, size), prefixes) in enumerate(sorted(schemes.items(), reverse=True))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }
