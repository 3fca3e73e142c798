"""From a checkpoint to a compressed one, a scope at a time.

Calibration, plan and scopes are phases. A phase is finished when its record is on disk, after its files and with their
SHA-256; a killed run goes on after what is finished, and only the whole output gets its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from globe.checkpoint.report import Report
from globe.checkpoint.writer import (
    require_space,
)
from globe.errors import SettingsError
from globe.plan.settings import CompressConfig
from globe.run.assemble import assemble
from globe.run.compensation import LayersInOrder, begin_compensation
from globe.run.folder import RunFolder, check_output, open_run, place_of_shards
from globe.run.job import Job, make_job
from globe.run.observer import Observer, Observers
from globe.run.prepare import Calibration, prepare
from globe.run.ranks import ALONE, Ranks
from globe.run.scope import fit_scope, follow, is_finished, scope_record


def compress(
    model: str | Path,
    output: str | Path,
    config: CompressConfig = CompressConfig(),  # noqa: B008
    observers: Iterable[Observer] = (),
    *,
    overwrite: bool = False,
    revision: str | None = None,
    cache: Path | None = None,
    low_disk: bool = False,
    ranks: Ranks = ALONE,
) -> Report:
    """Compress the routed experts of `model` (a local folder, a Hub id, or "shipped") into the folder `output`.

    The output is a Hugging Face checkpoint that `AutoModelForCausalLM` loads after `import globe`. Memory follows the
    largest scope, and the model itself where that is run: to calibrate and to plan, as a whole if it takes less than
    half of the machine's, else a layer at a time. A run on the output of a killed one goes on after what that finished;
    what was damaged since is done again. With `overwrite`, an output that GloBE wrote earlier is replaced when the new
    one is whole, and an unfinished run with other settings is started anew. `revision` names a branch, tag or commit of
    a model on the Hub, `cache` the folder that keeps it in place of the client's own; with `low_disk` a few of its
    shards at a time lie in the unfinished output, and each is fetched again for each pass. `ranks` are the processes
    that share planning and scopes.

    Raises, all of them `GlobeError`: `SettingsError` for settings that do not fit the model or differ from those of the
    run to go on with; `CheckpointError` for damaged files, weights that are not finite, and a source that changes
    while it is read; `UnsupportedModelError` for what is no mixture of experts that GloBE knows; `OutputError` if the
    output exists, another process writes it, or the disk is full.
    """
    watch = Observers(observers)
    if low_disk and ranks.size > 1:
        raise SettingsError("low_disk is for one process: the others may still be reading what it removes")
    try:
        check_output(Path(output))
        job = make_job(model, config, revision, cache, place_of_shards(Path(output)) if low_disk else None)
        return run_job(job, Path(output), watch, overwrite=overwrite, ranks=ranks)
    finally:
        watch.stop()


def run_job(
    job: Job,
    output: Path,
    watch: Observer,
    *,
    overwrite: bool = False,
    calibrated: Callable[[], Calibration] | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Do a job; `calibrated` gives what running the model told already."""
    for note in job.notes:
        watch.note(note)
    watch.prepare("reading the source")
    run = job.run()
    source = job.checkpoint.folder if job.checkpoint.repo is None else None
    with open_run(output, run, overwrite=overwrite, source=source) as folder:
        if not folder.whole():
            _work(job, folder, watch, calibrated, ranks)
        if job.checkpoint.coming is not None:
            job.checkpoint.coming.settle()
        folder.publish()
    return Report.read(folder.output)


def _work(
    job: Job, folder: RunFolder, watch: Observer, calibrated: Callable[[], Calibration] | None, ranks: Ranks
) -> None:
    """All phases that are not finished yet."""
    written = sum(path.stat().st_size for path in folder.path.glob("model-*.safetensors"))
    require_space(folder.path, job.predicted_bytes(job.scopes) + job.waiting_bytes() - written)
    preparation = prepare(job, watch, folder, calibrated, ranks)
    scopes = preparation.scopes
    # files are listed and not asked for by name: a network file system would remember those that are not there yet
    listed = {path.stem for path in folder.records.folder.iterdir()}
    finished = [
        number for number in range(len(scopes)) if scope_record(number) in listed and is_finished(folder, number, watch)
    ]
    left = [number for number in range(len(scopes)) if number not in finished]
    watch.start([scopes[number] for number in (*finished, *left)], len(finished))
    if job.config.is_coded and not job.config.is_packed and left:
        compensation, because = begin_compensation(job, preparation.calibration, folder.records.folder)
        folder.records.write("compensation", {"because": because})
    else:
        compensation = None
    if compensation is None:
        ranks.map(functools.partial(fit_scope, job, preparation, folder), left, watch=watch)
    else:
        layers = [index for number in left for index in scopes[number].layers]
        in_order = LayersInOrder(job, preparation, compensation, layers, ranks)
        for number in range(max(left) + 1):
            if number in left:
                fit_scope(job, preparation, folder, number, watch, in_order)
            else:
                follow(job, preparation, folder, number, compensation)
    assemble(job, preparation, folder)
