"""A dense model compressed while transformers loads it."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from globe.errors import FinishedError, SettingsError
from globe.model.quantization_config import QUANT_METHOD, CompressingConfig
from globe.plan.settings import CompressConfig
from globe.run.compress import compress


class GlobeConfig(CompressingConfig):
    """What `from_pretrained` takes as `quantization_config` to compress the model that it loads.

    Args:
        output: folder that keeps the compressed model, as `compress` writes it, and from which it is loaded when it is
            there already; None: a temporary one, of which `save_pretrained` saves the model alone.
        settings: fields of `CompressConfig`.

    The model's files are read as `compress` reads them, and only what is compressed is loaded. Raises `SettingsError`
    for settings that are out of their range, and for `format`, in which transformers would not load it.
    """

    def __init__(self, output: str | Path | None = None, **settings: Any) -> None:
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue] - an enum of the built-in ones
        self.output, self.config = output, CompressConfig(**settings)
        if self.config.is_packed:
            raise SettingsError(f"format {self.config.format} is not for loading: run `globe compress`")

    @contextlib.contextmanager
    def compressed(self, source: Path) -> Iterator[Path]:
        """The compressed model's folder, there until the model is loaded; raises as `compress` does."""
        with tempfile.TemporaryDirectory(prefix="globe-") as temporary:
            output = Path(temporary, "compressed") if self.output is None else Path(self.output)
            with contextlib.suppress(FinishedError):  # by an earlier call
                compress(source, output, self.config)
            yield output

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        output = None if self.output is None else str(self.output)
        return {"quant_method": QUANT_METHOD, "output": output, **dataclasses.asdict(self.config)}
