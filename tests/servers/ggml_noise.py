"""Run by the servers' Python: what llama.cpp's types lose of normal weights. JSON by type on the last line.

As `globe.plan.ggml_types` has it: squared error over squares, both weighted by an importance of inputs that is
exponentially distributed and that the quantiser knows.
"""

from __future__ import annotations

import ctypes
import json
import sys

import gguf
import numpy as np
import xllamacpp.xllamacpp

ROWS, INPUTS = 64, 2048


def main(names: list[str]) -> None:
    ggml = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    types = {each.name.lower(): each for each in gguf.GGMLQuantizationType}
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((ROWS, INPUTS), dtype=np.float32)
    importance = generator.exponential(size=INPUTS).astype(np.float32)
    noises: dict[str, float] = {}
    for name in names:
        found = types[name.lower()]
        block, num_bytes = gguf.GGML_QUANT_SIZES[found]
        stored = np.zeros((ROWS, INPUTS // block * num_bytes), np.uint8)
        ggml.ggml_quantize_init(int(found))
        ggml.ggml_quantize_chunk(
            int(found), weights.ctypes.data, stored.ctypes.data, 0, ROWS, INPUTS, importance.ctypes.data
        )
        error = importance * (gguf.dequantize(stored, found) - weights) ** 2
        noises[name] = float(error.sum() / (importance * weights**2).sum())
    print(json.dumps(noises))


if __name__ == "__main__":
    main(sys.argv[1:])
