"""For llama.cpp's own quantiser: an importance matrix of the experts, and the type of each of their tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from globe.bank_shape import sides
from globe.checkpoint.imatrix import (
    IMATRIX,
    TENSOR_TYPES,
    experts_name,
    gguf_package,
    save_imatrix,
    save_tensor_types,
)
from globe.errors import SettingsError, UnsupportedModelError
from globe.experts.coding import damped
from globe.experts.metric import LayerStatistics
from globe.measure.sensitivity import Sensitivities
from globe.plan.budget import Bits
from globe.plan.ggml_types import GgmlType, types_for
from globe.plan.knapsack import choose
from globe.plan.settings import CompressConfig
from globe.run.folder import RunFolder, open_run
from globe.run.job import Job, make_job
from globe.run.observer import Observer, Observers
from globe.run.prepare import calibration_of
from globe.terms import FAMILIES, Family


@dataclasses.dataclass(frozen=True)
class TypePlan:
    """How bits are shared out among the experts' tensors, each of which holds a family of a layer."""

    types: Mapping[str, str]
    """By tensor, as llama.cpp spells both."""
    bits: float
    """Stored bits of a weight of the experts."""
    predicted_kl: float
    """The divergence from the original to second order, in nats per token."""


def write_imatrix(
    model: str | Path,
    output: str | Path,
    config: CompressConfig = CompressConfig(),  # noqa: B008
    observers: Iterable[Observer] = (),
    *,
    overwrite: bool = False,
    revision: str | None = None,
    cache: Path | None = None,
) -> TypePlan:
    """Write what `llama-quantize` needs to round the routed experts of `model` as well as their bytes allow.

    `output` receives imatrix.gguf, for `--imatrix`, and tensor_types.txt, for `--tensor-type-file`: the types, among
    llama.cpp's k- and i-quants, that lose least within `config.bits` stored bits per weight. The model is run as the
    settings say. A run on the output of a killed one takes up its calibration.

    Raises as `compress` does; `SettingsError` also where the package gguf is not installed, the model is not to be run
    or the bits are out of reach, and `UnsupportedModelError` for experts whose sides 32 does not divide.
    """
    gguf_package()
    watch = Observers(observers)
    try:
        job = make_job(model, config, revision, cache)
        _check(job)
        for note in job.notes:
            watch.note(note)
        source = job.checkpoint.folder if job.checkpoint.repo is None else None
        run = {**job.run(), "command": "imatrix"}
        with open_run(Path(output), run, overwrite=overwrite, source=source) as folder:
            if not folder.whole():
                _write(job, folder, watch)
            record = folder.records.read("plan")
            assert record is not None
            folder.publish()
        return TypePlan(**record)
    finally:
        watch.stop()


def _write(job: Job, folder: RunFolder, watch: Observer) -> None:
    calibration = calibration_of(job, watch, folder)
    if calibration.statistics is None or calibration.sensitivities is None:
        raise SettingsError(f"an importance matrix is what running the model says: {calibration.uncalibrated_because}")
    assert calibration.windows is not None
    assert calibration.report is not None
    plan = plan_types(job, calibration.sensitivities)
    importance = {
        experts_name(index, family): _importance(calibration.statistics[index], family)
        for index, family in job.compressed()
    }
    job.check_unchanged(folder.records.run["fingerprint"])
    folder.records.write("plan", dataclasses.asdict(plan))
    text, windows = calibration.report.text, calibration.windows
    files = {
        IMATRIX: save_imatrix(folder.path / IMATRIX, importance, text, windows),
        TENSOR_TYPES: save_tensor_types(folder.path / TENSOR_TYPES, plan.types),
    }
    folder.complete(files)


def _importance(statistics: LayerStatistics, family: Family) -> tuple[Tensor, Tensor]:
    """Sums of the squared inputs (E, N) of a family's experts, and the tokens (E,) that they are of.

    For gate and up the layer's mean over all tokens stands for an expert's own; what down multiplies is weighted by the
    router. An expert's down that no token reached has none, and llama.cpp then takes all inputs for equal.
    """
    if family == "down":
        assert statistics.inner is not None
        return statistics.inner.diagonal(dim1=1, dim2=2), statistics.counts
    counts = statistics.counts.clamp_min(1)
    return counts[:, None] * statistics.inputs.diagonal(), counts


def plan_types(job: Job, sensitivities: Sensitivities) -> TypePlan:
    """The types that lose least within the budget of bits."""
    assert isinstance(job.config.budget, Bits)
    keys, importance = job.compressed(), damped(sensitivities)
    menus = [_menu(job, *key) for key in keys]
    sizes = [
        [each.stored(_num_weights(job, index)) for each in menu] for (index, _), menu in zip(keys, menus, strict=True)
    ]
    costs = [
        [float(importance[key].sum()) * each.noise for each in menu] for key, menu in zip(keys, menus, strict=True)
    ]
    chosen = choose(costs, sizes, job.config.budget.num_bytes(job.original_parameters()))
    types = {key: menu[option] for key, menu, option in zip(keys, menus, chosen, strict=True)}
    num_bytes = sum(each.stored(_num_weights(job, index)) for (index, _), each in types.items())
    return TypePlan(
        {experts_name(*key): each.name for key, each in types.items()},
        8 * num_bytes / job.original_parameters(),
        math.fsum(float(sensitivities[key].sum()) * each.noise for key, each in types.items()),
    )


def _check(job: Job) -> None:
    """Raise `UnsupportedModelError` for experts that no type holds, `SettingsError` for what is not asked of them."""
    if not job.config.is_coded or job.config.is_packed or job.config.families != FAMILIES:
        raise SettingsError(
            "llama.cpp has types of its own for whole experts: leave out keep, ratios, format, families"
        )
    for index, family in job.compressed():
        if not _menu(job, index, family):
            num_inputs, _ = sides(job.layers[index], family)
            raise UnsupportedModelError(
                f"the experts of layer {index} have {num_inputs} inputs of {family}, and llama.cpp rounds in blocks of "
                "32 at least: it keeps these in 16 bits; `globe compress` has formats for them"
            )
    assert isinstance(job.config.budget, Bits)
    least = sum(_menu(job, *key)[0].stored(_num_weights(job, key[0])) for key in job.compressed())
    if least > job.config.budget.num_bytes(job.original_parameters()):
        bits = 8 * least / job.original_parameters()
        raise SettingsError(
            f"bits {job.config.budget.per_weight:g} is out of reach: llama.cpp's smallest types take {bits:.2f} here; "
            "choose more"
        )


def _menu(job: Job, index: int, family: Family) -> tuple[GgmlType, ...]:
    return types_for(sides(job.layers[index], family)[0])


def _num_weights(job: Job, index: int) -> int:
    """Of one family of a layer."""
    layer = job.layers[index]
    return layer.num_experts * layer.intermediate_size * layer.hidden_size
