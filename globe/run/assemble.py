"""The output made whole: everything that is not a factor, and the record of the run."""

from __future__ import annotations

import dataclasses
from typing import Any

from globe.checkpoint.card import CARD, read_source_card, write_native_card
from globe.checkpoint.evaluation import EVALUATION
from globe.checkpoint.manifest import MANIFEST
from globe.checkpoint.reader import INDEX, open_checkpoint
from globe.checkpoint.report import REPORT, BankReport, CodedReport, Report
from globe.checkpoint.side_files import CONFIG
from globe.checkpoint.source_layout import SOURCE_LAYOUT, write_source_layout
from globe.checkpoint.tensor_files import copy_tensors
from globe.checkpoint.writer import copy_side_files, write_file, write_index, write_json
from globe.errors import CheckpointError
from globe.machine.memory import peak_memory
from globe.model.autoload import AUTO_MAP, AUTOLOAD, write_autoload
from globe.model.configuration import in_json
from globe.model.quantization_config import GlobeQuantizationConfig
from globe.model.source import open_source
from globe.plan.recipe import RECIPE, recipe_text
from globe.run.folder import RunFolder
from globe.run.job import Job
from globe.run.prepare import Preparation
from globe.run.records import as_json
from globe.run.rounding import RoundingPlan, section
from globe.run.scope import scope_record
from globe.typed import parsed
from globe.version import versions


def assemble(job: Job, preparation: Preparation, folder: RunFolder) -> None:
    """Add everything that is not a factor, check that the whole opens, and record it."""
    weight_map: dict[str, str] = {}
    compressed_bytes = 0
    banks: list[BankReport] = []
    coded: list[CodedReport] = []
    specs: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    for number in range(len(preparation.scopes)):
        record = folder.records.read(scope_record(number))
        assert record is not None
        banks += parsed(list[BankReport], record["banks"], scope_record(number), CheckpointError)
        coded += [CodedReport(**part) for part in record["coded"]]
        specs += record["specs"]
        for file, content in record["files"].items():
            files[file] = content["sha256"]
            weight_map |= dict.fromkeys(content["tensors"], file)
            compressed_bytes += sum(content["tensors"].values())
    kept = job.kept()
    for shard, file in job.kept_files().items():
        files[file] = copy_tensors(job.checkpoint, shard, kept[shard], folder.path / file)
        weight_map |= dict.fromkeys(kept[shard], file)
        compressed_bytes += sum(job.checkpoint.tensors[name].nbytes for name in kept[shard])
    calibration = preparation.calibration
    report = Report(
        job.source,
        folder.records.run["fingerprint"],
        as_json(dataclasses.asdict(job.config)),
        versions(),
        banks,
        coded,
        job.original_bytes(),
        compressed_bytes,
        preparation.seconds + sum(part.seconds for part in (*banks, *coded)),
        peak_memory(),
        calibration.report,
        calibration.uncalibrated_because,
        preparation.uniform_because,
        (folder.records.read("compensation") or {}).get("because"),
        preparation.coding and preparation.coding.predicted_kl,
        None if job.checkpoint.repo is None else job.checkpoint.repo.commit,
        list(job.notes),
    )
    files |= copy_side_files(job.checkpoint, folder.path, leave_out=(MANIFEST, CARD, EVALUATION))
    recipe = recipe_text(report.source, report.commit, report.config, report.versions["globe"])
    files[RECIPE] = write_file(folder.path / RECIPE, recipe.encode())
    card = write_native_card(report, read_source_card(job.checkpoint), recipe)
    files[CARD] = write_file(folder.path / CARD, card)
    files[SOURCE_LAYOUT] = write_source_layout(folder.path, job.checkpoint)
    files[INDEX] = write_index(folder.path, weight_map, compressed_bytes)
    files[REPORT] = write_json(folder.path / REPORT, report.to_json())
    config = {key: value for key, value in job.checkpoint.config.items() if key != "auto_map"}
    if isinstance(preparation.coding, RoundingPlan):
        config["quantization_config"] = section(job, preparation.coding)
    else:
        files[AUTOLOAD] = write_autoload(folder.path)
        config["auto_map"] = AUTO_MAP
        config["quantization_config"] = GlobeQuantizationConfig(
            job.specs(preparation.scopes),
            specs,
            job.config.activation,
            globe_version=versions()["globe"],
            run=folder.records.identity,
        ).to_dict()
    files[CONFIG] = write_json(folder.path / CONFIG, in_json(config))
    (open_source if job.config.is_packed else open_checkpoint)(folder.path)
    job.check_unchanged(folder.records.run["fingerprint"])
    folder.complete(files)
