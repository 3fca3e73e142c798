"""Sources whose weights are not plain floating point: refused by name, since their numbers are not the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from globe.checkpoint.header import FLOAT_DTYPES
from globe.checkpoint.reader import Checkpoint
from globe.errors import UnsupportedModelError

_ADVICE = f"only {', '.join(FLOAT_DTYPES)} weights are read: use the unquantised release, or dequantise it first"


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise `UnsupportedModelError` if config.json or the experts' dtypes say that the weights are quantised.

    A checkpoint that GloBE has compressed is refused too: its experts are no longer dense.
    """
    for section in (checkpoint.config, checkpoint.text_config):
        # compression_config is what early compressed-tensors models call it
        if found := section.get("quantization_config") or section.get("compression_config"):
            _refuse_method(checkpoint, _method(found))
    packed = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if ".experts." in name and tensor.dtype not in FLOAT_DTYPES
    ]
    if packed:
        raise UnsupportedModelError(
            f"{checkpoint.folder}: {len(packed)} expert tensors are quantised, such as {packed[0].name} "
            f"({packed[0].dtype}); {_ADVICE}"
        )


def _refuse_method(checkpoint: Checkpoint, method: str) -> None:
    if method == "globe":
        raise UnsupportedModelError(
            f"{checkpoint.folder} is already compressed by GloBE: evaluate or export it, or compress its source"
        )
    raise UnsupportedModelError(f"{checkpoint.folder} is quantised ({method}, says its config.json); {_ADVICE}")


def _method(section: Any) -> str:
    if not isinstance(section, Mapping):
        return repr(section)
    if "quant_method" in section:
        return str(section["quant_method"])
    if any(key.startswith(("load_in_", "bnb_")) for key in section):  # written before quant_method existed
        return "bitsandbytes"
    return "by a method it does not name"
