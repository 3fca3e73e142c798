"""What a compression does, decided before any work: settings, files and transformers' model of them fit each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from globe.checkpoint.compressed_tensors import group_notes
from globe.checkpoint.layout import dtype_notes
from globe.errors import CheckpointError, UntrustedCodeError
from globe.measure.calibrate import CalibrationText, read_calibration_text
from globe.model.bank_spec import BankSpec
from globe.model.empty_model import check_same_experts
from globe.model.expert_modules import factor_names, find_experts
from globe.model.loading import check_language_model, check_weights, empty_model
from globe.model.names import FactorNames
from globe.plan.scopes import BankPlan, Scope
from globe.plan.settings import CompressConfig
from globe.run import allocation
from globe.run.outline import Outline, outline
from globe.version import versions


@dataclasses.dataclass(frozen=True)
class Job(Outline):
    """What a compression does, decided before any work."""

    names: FactorNames
    calibration_text: CalibrationText | None
    """Where one is given; the model's own samples are not known yet."""
    notes: tuple[str, ...]
    """What is done otherwise than one might expect."""

    def run(self) -> dict[str, Any]:
        """What the run is made of: only the same run goes on in an unfinished output."""
        return {
            "command": "compress",
            "source": self.source,
            "fingerprint": self.checkpoint.fingerprint(),
            "globe_version": versions()["globe"],
            "config": dataclasses.asdict(self.config),
            "calibration": None if self.calibration_text is None else self.calibration_text.fingerprint,
        }

    def check_unchanged(self, fingerprint: str) -> None:
        """Raise `CheckpointError` if the source is not what it was when the run began."""
        if self.checkpoint.fingerprint() != fingerprint:
            raise CheckpointError(
                f"{self.checkpoint.folder} changed while it was read: what was finished before is kept; put the files "
                "back and run the same command again, or give --overwrite to start anew"
            )

    def spec(self, bank: BankPlan) -> BankSpec:
        return BankSpec(bank.layers, bank.families, bank.shape.rank, bank.shape.num_bases)

    def specs(self, scopes: Sequence[Scope]) -> list[BankSpec]:
        return [self.spec(bank) for scope in scopes for bank in scope.banks]


def make_job(
    model: str | Path,
    config: CompressConfig,
    revision: str | None = None,
    cache: Path | None = None,
    passing: Path | None = None,
) -> Job:
    """Open the source and check that settings, files and transformers' model of it fit each other; raises otherwise as
    `compress` does."""
    outlined = outline(model, config, revision, cache, passing)
    checkpoint, config, layers, scopes = outlined.checkpoint, outlined.config, outlined.layers, outlined.scopes
    empty = empty_model(checkpoint)
    check_same_experts(layers, find_experts(empty))
    check_weights(checkpoint, empty)
    num_banks = sum(len(scope.banks) for scope in scopes)
    measures = (
        config.allocation != "uniform"
        if config.is_coded
        else allocation.obstacle(checkpoint, config, num_banks) is None
    )
    if config.calibrate != "none" or measures:
        check_language_model(checkpoint, empty)
    notes, text = [*checkpoint.notes, *dtype_notes(layers.values()), *checkpoint.side_files().left_out], None
    if config.is_packed:
        notes += group_notes(layers.values())
    if (name := config.calibrate) not in ("samples", "none"):
        try:
            text = read_calibration_text(checkpoint.folder, name, config.calibration_tokens, config.trust_remote_code)
        except UntrustedCodeError as error:
            notes.append(f"calibrated on samples of the model itself, not on {name}: {error}")
    return Job(outlined.source, checkpoint, config, layers, scopes, factor_names(empty), text, tuple(notes))
