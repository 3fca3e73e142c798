"""The record of a compression: settings, versions, errors, time and memory; enough to redraw every figure."""

from __future__ import annotations

import dataclasses
import html
import importlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from globe.bank_shape import BankShape
from globe.checkpoint.files import read_json, unwritten
from globe.checkpoint.quantized import QUANT_METHOD, quant_method
from globe.checkpoint.reader import open_checkpoint
from globe.errors import CheckpointError, SettingsError
from globe.terms import FAMILIES
from globe.typed import documented, parsed, shown
from globe.units import byte_size

REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class BankReport:
    """How one bank was fitted."""

    layers: list[int]
    families: list[str]
    shape: BankShape
    outcome: str
    """Why the fit stopped."""
    seconds: float
    errors: dict[str, dict[str, float]]
    """Relative Frobenius error as stored, by layer and family."""
    expert_errors: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    """The same of every expert."""
    steps: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """The step records, a list for each field: error, raw_error, activation_lambda, route_beta, temperature, …"""
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Warm-start quality, popularity of the bases, fallbacks, restarts or rejected steps, and `phases`: seconds of
    reading, warm start, fit and storing."""

    @property
    def error(self) -> float:
        """Root mean square of the layers' and families' relative errors: what the fit minimises."""
        return root_mean_square(error for families in self.errors.values() for error in families.values())


@dataclasses.dataclass(frozen=True)
class CodedReport:
    """How a family of a layer was coded."""

    layer: int
    family: str
    original_parameters: int
    stored_bytes: int
    """Paths, widths and scales, and the bank."""
    num_bases: int
    """Of the bank of what the experts share; 0 where none pays."""
    bank_bytes: int
    """Of `stored_bytes`, those of the bank."""
    seconds: float
    error: float
    """Relative Frobenius error."""
    expert_errors: list[float]
    """The same of every expert."""
    expert_widths: list[float]
    """Mean bits of every expert's entries, paths alone."""
    rows_by_width: list[int]
    """Rows (an input of an expert) of 0, ½, 1, … 8 bits."""
    compensated: float | None = None
    """Of down: what it makes up for of the difference that earlier layers, gate and up make in the layer's output, as a
    share of squares on the calibration's tokens; None where it was coded as it is."""

    @property
    def bits(self) -> float:
        """Stored bits of an original weight, everything counted."""
        return 8 * self.stored_bytes / self.original_parameters


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What a compression was calibrated on."""

    text: str
    """`samples` of the model itself, a shipped split or a file."""
    fingerprint: str
    """Of its tokens."""
    num_tokens: int
    num_experts: int
    """Of all layers that were compressed."""
    unreached: dict[str, list[int]]
    """By layer, the experts that no token was routed to; they are weighed as the layer's mean."""
    on_cpu_because: str | None = None
    """Why the model was run there and not on the device of the fits; None where it was not."""
    streamed_because: str | None = None
    """Why the model was run a layer at a time, and so not on samples of its own; None where it was not."""

    @property
    def num_unreached(self) -> int:
        return sum(map(len, self.unreached.values()))


@documented
@dataclasses.dataclass(frozen=True)
class Report:
    """A whole compression."""

    source: str
    """The model as it was named."""
    fingerprint: str
    """Of the source checkpoint."""
    config: dict[str, Any]
    """The resolved settings."""
    versions: dict[str, str]
    banks: list[BankReport]
    coded: list[CodedReport]
    original_bytes: int
    """Of all tensors of the source."""
    compressed_bytes: int
    """Of all tensors of the output."""
    seconds: float = 0.0
    """Spent on calibration, planning and finished scopes, over all runs that it took."""
    peak_memory_bytes: int = 0
    """Largest resident memory of the process."""
    calibration: CalibrationReport | None = None
    """None: fitted to the weights alone."""
    uncalibrated_because: str | None = None
    """Why; None where it was calibrated."""
    uniform_because: str | None = None
    """Why every bank keeps the same share; None where the budget was allocated."""
    uncompensated_because: str | None = None
    """Of coded experts: why no layer makes up for the errors of those before it; None where they do."""
    predicted_kl: float | None = None
    """Of coded experts: the divergence from the original to second order, in nats per token of the calibration text."""
    commit: str | None = None
    """Of a source on the Hub."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What was left out, or done in another way than the settings say, and why."""

    def __repr__(self) -> str:
        return f"Report({', '.join(f'{name}: {value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._facts()
        )
        return f"<table>{''.join(rows)}</table>"

    def _facts(self) -> list[tuple[str, str]]:
        stored = f"{self.bits:.3f} bits a weight" if self.bits is not None else f"{self.kept:.4f} of their parameters"
        size = f"{byte_size(self.compressed_bytes)} of {byte_size(self.original_bytes)}"
        return [
            ("source", self.source),
            ("experts", stored),
            ("whole model", size),
            ("relative error", f"{self.error:.4f}"),
            ("layers", str(len(self.layers))),
        ]

    def to_pandas(self) -> Any:
        """A pandas `DataFrame` with a row for each layer and family: relative error, and stored bytes, bits and bases
        where it is coded. Raises `SettingsError` where pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise SettingsError("to_pandas needs a package: pip install pandas") from error
        rows = [
            {"layer": int(layer), "family": family, "error": error}
            for bank in self.banks
            for layer, families in bank.errors.items()
            for family, error in families.items()
        ]
        rows += [
            {
                "layer": part.layer,
                "family": part.family,
                "error": part.error,
                "stored_bytes": part.stored_bytes,
                "bits": part.bits,
                "num_bases": part.num_bases,
            }
            for part in self.coded
        ]
        return pandas.DataFrame(rows)

    @property
    def layers(self) -> list[int]:
        """Those with experts that were compressed."""
        return sorted({layer for bank in self.banks for layer in bank.layers} | {part.layer for part in self.coded})

    @property
    def kept(self) -> float:
        """Of the compressed families, stored over original: parameters of banks, or of what is coded bits over 16."""
        in_banks = sum(bank.shape.parameters for bank in self.banks)
        return (in_banks + sum(part.stored_bytes for part in self.coded) / 2) / self.original_parameters

    @property
    def original_parameters(self) -> int:
        """Of the compressed families."""
        shapes = [bank.shape for bank in self.banks]
        return sum(part.original_parameters for part in (*shapes, *self.coded))

    @property
    def bits(self) -> float | None:
        """Stored bits per original weight of the coded families, everything counted; None where nothing is coded."""
        original = sum(part.original_parameters for part in self.coded)
        return 8 * sum(part.stored_bytes for part in self.coded) / original if original else None

    @property
    def error(self) -> float:
        """Root mean square of all layers' and families' relative errors."""
        return root_mean_square(error for _, error in self._errors())

    def family_errors(self) -> dict[str, float]:
        """Root mean square over the layers, by family."""
        by_family: dict[str, list[float]] = {}
        for family, error in self._errors():
            by_family.setdefault(family, []).append(error)
        return {family: root_mean_square(errors) for family, errors in by_family.items()}

    def _errors(self) -> Iterator[tuple[str, float]]:
        for bank in self.banks:
            for families in bank.errors.values():
                yield from families.items()
        yield from ((part.family, part.error) for part in self.coded)

    def to_json(self) -> dict[str, Any]:
        summary = {"kept": self.kept, "bits": self.bits, "error": self.error, "family_errors": self.family_errors()}
        return {**summary, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> Report:
        """The report of a compressed model, as far as this version knows its fields.

        Raises `CheckpointError` if the folder has none, or naming the field that no compression has written so.
        """
        path = folder / REPORT
        if not path.exists():
            raise CheckpointError(
                f"{folder} has no {REPORT}; {unwritten(folder) or 'is it the output of globe compress?'}"
            )
        report = parsed(cls, read_json(path), str(path), CheckpointError)
        if fault := next(report.faults(), None):
            raise CheckpointError(f"{path}: {fault}; is it the output of globe compress?")
        return report

    def faults(self) -> Iterator[str]:
        """What no compression leaves: sizes of nothing, and errors of layers that are not numbered."""
        if not self.banks and not self.coded:
            yield "banks and coded are empty"
        sizes = {"original_bytes": self.original_bytes, "compressed_bytes": self.compressed_bytes}
        for number, bank in enumerate(self.banks):
            sizes |= {f"banks[{number}].shape.{name}": size for name, size in dataclasses.asdict(bank.shape).items()}
            for name, errors in (("errors", bank.errors), ("expert_errors", bank.expert_errors)):
                if not all(layer.isdecimal() and len(layer) < 10 and errors[layer] for layer in errors):
                    yield f"banks[{number}].{name} is {shown(errors)}, not by number of the layer and family"
            if not (bank.layers and bank.families and bank.errors):
                yield f"banks[{number}] has no layers, families or errors"
        for number, part in enumerate(self.coded):
            sizes |= {
                f"coded[{number}].{name}": getattr(part, name) for name in ("original_parameters", "stored_bytes")
            }
            if part.layer < 0 or part.family not in FAMILIES or not part.expert_widths or len(part.rows_by_width) != 17:
                yield f"coded[{number}] is not of a layer and a family with experts"
        yield from (f"{name} is {size}, which cannot be" for name, size in sizes.items() if size < 1)
        seconds = (self.seconds, *(part.seconds for part in (*self.banks, *self.coded)))
        yield from (f"{spent} seconds cannot be" for spent in seconds if not 0 <= spent < 1e12)


def root_mean_square(errors: Iterable[float]) -> float:
    values = list(errors)
    return math.hypot(*values) / math.sqrt(len(values))


def is_compressed(model: str | Path) -> bool:
    """Whether it is a folder with a model that GloBE has compressed, in its own format or another."""
    if not Path(model).is_dir():
        return False
    method = quant_method(open_checkpoint(model))
    return method == QUANT_METHOD or (method is not None and (Path(model) / REPORT).is_file())
