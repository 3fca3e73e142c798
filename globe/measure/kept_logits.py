"""The logits of a reference on a text in a file, so that any number of candidates need the reference once.

Logits are kept as the model gives them, in its own dtype: what is measured against them is the same to the last bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from globe.checkpoint.dtypes import DTYPE_NAMES
from globe.checkpoint.header import TensorInfo, build_header, read_header, read_metadata
from globe.checkpoint.tensor_files import tensor_bytes
from globe.checkpoint.writer import make_folder, replacing, require_space
from globe.errors import CheckpointError, SettingsError
from globe.typed import parsed

_LOGITS, _ABOUT = "logits", "globe_reference"


@dataclasses.dataclass(frozen=True)
class About:
    """Whose logits they are, and on what."""

    reference: str
    """Name of the model."""
    reference_fingerprint: str
    """Of its checkpoint."""
    text: str
    """Name of the text."""
    fingerprint: str
    """Of its tokens, window by window."""


@dataclasses.dataclass(frozen=True)
class KeptLogits:
    """Logits (N, length - 1, vocabulary) in a file, of which a batch is read at a time."""

    path: Path
    about: About
    shape: tuple[int, ...]

    def batch(self, first: int, count: int) -> Tensor:
        """Of the windows from `first` on, (count, length - 1, vocabulary)."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_slice(_LOGITS)[first : first + count]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read any more: {error}") from error

    def check(self, about: About, windows: Tensor) -> None:
        """Raise `SettingsError` naming what differs unless these are the logits that are asked for, of all windows."""
        for name, what in (("fingerprint", "text"), ("reference_fingerprint", "reference")):
            if getattr(self.about, name) != getattr(about, name):
                raise SettingsError(
                    f"{self.path} keeps logits of {self.about.reference} on {self.about.text}, which is another {what} "
                    f"than {getattr(about, what)} (or other tokens of it): name another file, or remove this one"
                )
        if self.shape[:2] != (windows.shape[0], windows.shape[1] - 1):
            raise CheckpointError(f"{self.path} does not hold the logits of all its text: remove it")


def open_logits(path: Path) -> KeptLogits:
    """The logits that `keep_logits` wrote; `CheckpointError` for any other file."""
    tensors = read_header(path, path.name)
    if [(tensor.name, len(tensor.shape)) for tensor in tensors] != [(_LOGITS, 3)]:
        raise CheckpointError(f"{path} holds no logits of a reference: name another file")
    try:
        content = json.loads(read_metadata(path, path.name).get(_ABOUT, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path} does not say whose logits it holds ({error}): remove it") from error
    return KeptLogits(path, parsed(About, content, str(path), CheckpointError), tensors[0].shape)


def keep_logits(path: Path, batches: Iterator[Tensor], num_windows: int, about: About) -> KeptLogits:
    """Write logits, (count, length - 1, vocabulary) for batch after batch of all windows, into a new file.

    Raises `OutputError` with the size where the disk has no room for it.
    """
    first = next(batches)
    shape = (num_windows, *first.shape[1:])
    num_bytes = first.nbytes // len(first) * num_windows
    make_folder(path.parent)
    require_space(path, num_bytes)
    info = TensorInfo(_LOGITS, DTYPE_NAMES[first.dtype], shape, path.name, 0, num_bytes)
    with replacing(path, num_bytes) as file:
        file.write(build_header([info], {"format": "pt", _ABOUT: json.dumps(dataclasses.asdict(about))}))
        file.write(tensor_bytes(first))
        for batch in batches:
            file.write(tensor_bytes(batch))
    return KeptLogits(path, about, shape)
