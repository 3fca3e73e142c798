"""A coded model read as the page on the format says, entry by entry, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from globe import compress, export_dense
from globe.checkpoint.reader import open_checkpoint
from globe.quant.trellis import DISTORTION, GAIN
from globe.terms import FAMILIES
from tests.coded import ALONE, D, E, write_source

X = "model.layers.1.mlp.experts"
THRESHOLDS = [-256 * math.log2(1 - DISTORTION[2])]
THRESHOLDS += [-256 * math.log2(2 * (DISTORTION[w - 1] - DISTORTION[w])) for w in range(3, 17)]


def width_and_exponent(stored: dict[str, Tensor], spec: dict[str, Any], e: int, i: int) -> tuple[int, int]:
    """Of a row: half bits, and the exponent of the scale."""
    if spec["shared"]:
        cost = int(stored["expert_costs"][e]) + int(stored["input_costs"][i])
        reached = sum(cost >= round(threshold) for threshold in THRESHOLDS)
        return (reached + 1 if reached else 0), int(stored["expert_scales"][e]) + int(stored["input_scales"][i])
    step = int(stored["row_widths"][e, i // 2]) >> 4 * (i % 2) & 15
    return (step + 1 if step else 0), int(stored["expert_scales"][e]) - int(stored["row_scales"][e, i])


def unrotated(y: list[float]) -> list[float]:
    K = len(y)
    L = math.gcd(K, 2**20)
    m, h = K // L, [0.0] * K
    for k in range(K):
        block = k - k % L
        h[k] = sum((-1) ** (k % L & j).bit_count() * y[block + j] for j in range(L)) / math.sqrt(L)
    sums = [sum(h[k::L]) for k in range(L)]
    mixed = [h[k] - (2 / m * sums[k % L] if m > 1 else 0) for k in range(K)]
    return [-x if 2654435761 * (k + 1) % 2**32 >= 2**31 else x for k, x in enumerate(mixed)]


def decoded(stored: dict[str, Tensor], spec: dict[str, Any], N: int, K: int) -> Tensor:
    """(E, N, K), float64."""
    length, place, found = max(K + K % 2, 12), 0, torch.zeros(E, N, K, dtype=torch.float64)
    payload = bytes(stored["payload"].tolist())
    for e in range(E):
        for i in range(N):
            width, exponent = width_and_exponent(stored, spec, e, i)
            bits, num_bytes = length * width // 2, -(-length * width // 16)
            ring = int.from_bytes(payload[place : place + num_bytes], "little")
            ring, place = ring | ring << bits, place + num_bytes
            if not width:
                continue
            step, y = 2 ** (exponent / 6) * GAIN[width] / 136.688, list[float]()
            for t in range(K):
                state = (ring >> (t * width // 2)) % 4096
                mixed = (2524809683 * state + 4196459566) % 2**32
                y.append(step * (sum(mixed.to_bytes(4, "little")) - 509))
            found[e, i] = torch.tensor(unrotated(y), dtype=torch.float64)
        if spec["scaled"]:
            found[e] *= 2 ** (-stored["output_scales"][e].double() / 2)
    assert place == len(payload) == spec["payload"]
    return found


@pytest.mark.parametrize("P", [24, 13])
def test_experts_are_what_the_format_says(tmp_path: Path, P: int) -> None:
    write_source(tmp_path / "source", moe_intermediate_size=P)
    compress(tmp_path / "source", tmp_path / "coded", ALONE)
    dense = open_checkpoint(export_dense(tmp_path / "coded", tmp_path / "dense"))
    specs = json.loads((tmp_path / "coded" / "config.json").read_text())["quantization_config"]["coded"]
    tensors = {n: t for path in (tmp_path / "coded").glob("*.safetensors") for n, t in load_file(path).items()}
    forms: set[tuple[bool, bool]] = set()
    for family in FAMILIES:
        (spec,) = (spec for spec in specs if (spec["layer"], spec["family"]) == (1, family))
        assert spec["num_bases"] == 0
        forms.add((spec["shared"], spec["scaled"]))
        start = f"{X}.globe_{family}_"
        stored = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        N, K = (P, D) if family == "down" else (D, P)
        experts = decoded(stored, spec, N, K)
        for e in range(E):
            weights = dense.read(f"{X}.{e}.{family}_proj.weight").double().T
            torch.testing.assert_close(experts[e], weights, rtol=1e-5, atol=1e-5 * float(weights.abs().max()))
    assert {shared for shared, _ in forms} == {scaled for _, scaled in forms} == {False, True}
