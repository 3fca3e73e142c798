"""What a model is compared with, and whether it was compressed from that: the fingerprint tells, not the name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import REPORT, Report, is_compressed
from globe.checkpoint.shipped import resolve_model
from globe.errors import CheckpointError, GlobeError, SettingsError, UnsupportedModelError
from globe.measure.kept_logits import About
from globe.model.source import open_source


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model to compare with."""

    model: str
    """Folder or Hub id."""
    is_original: bool
    """Whether the model in question was compressed from it."""
    known: str | None = None
    """Its fingerprint, where that is known already."""

    def fingerprint(self) -> str:
        """As compress takes it; of what cannot be compressed, that of its files."""
        return self.known or _fingerprint(self.model) or open_checkpoint(self.model).fingerprint()

    @property
    def name(self) -> str:
        return "the original" if self.is_original else self.model


def named_reference(model: str | Path, reference: str | Path) -> Reference:
    """The model that the user names; raises `CheckpointError` if it cannot be opened."""
    reference = resolve_model(reference)
    open_checkpoint(reference)
    report = report_of(model)
    return Reference(str(reference), report is not None and _fingerprint(reference) == report.fingerprint)


def source_reference(model: str | Path) -> Reference | None:
    """The source of a compressed model, if it has a report.

    A report may come from anywhere, so what it names is only taken from a folder at hand, and only if it is the very
    model that was compressed. Raises `CheckpointError` saying why it is not.
    """
    report = report_of(model)
    if report is None:
        return None
    source, ask = Path(str(resolve_model(report.source))), "name what to compare with as --reference"
    if not source.is_dir():
        raise CheckpointError(f"{source}, from which it was compressed, is not a folder here: {ask}")
    try:
        fingerprint = _fingerprint(source)
    except GlobeError as error:
        raise CheckpointError(f"{source}, from which it was compressed, cannot be read ({error}): {ask}") from error
    if fingerprint != report.fingerprint:
        raise CheckpointError(f"{source} is not, or no longer, the model from which it was compressed: {ask}")
    return Reference(str(source), is_original=True, known=fingerprint)


def kept_reference(model: str | Path, about: About) -> Reference:
    """The model whose logits were kept; `SettingsError` if `model` was compressed from another."""
    report = report_of(model)
    if report is not None and report.fingerprint != about.reference_fingerprint:
        raise SettingsError(
            f"the kept logits are of {about.reference}, which {model} was not compressed from: name it as --reference "
            "if you want to compare with it, or name another file"
        )
    return Reference(about.reference, report is not None, about.reference_fingerprint)


def report_of(model: str | Path) -> Report | None:
    """The report beside a compressed model; a copy that save_pretrained made has none."""
    return Report.read(Path(model)) if is_compressed(model) and (Path(model) / REPORT).is_file() else None


def _fingerprint(model: str | Path) -> str | None:
    """As compress takes it; None for what cannot be compressed."""
    try:
        return open_source(model).fingerprint()
    except UnsupportedModelError:
        return None
