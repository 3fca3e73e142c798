"""From a compressed checkpoint back to a dense one: the source's names, dtypes and shards, for any server."""

from __future__ import annotations

from pathlib import Path

from globe.checkpoint.card import CARD, EXPORT, carried_card, describe_export, export_metadata, write_dense_card
from globe.checkpoint.evaluation import EVALUATION, read_evaluations
from globe.checkpoint.header import aligned
from globe.checkpoint.manifest import MANIFEST, verify_model
from globe.checkpoint.reader import INDEX, SINGLE, open_checkpoint
from globe.checkpoint.report import REPORT, Report
from globe.checkpoint.shipped import resolve_model
from globe.checkpoint.side_files import CONFIG
from globe.checkpoint.source_layout import SOURCE_LAYOUT
from globe.checkpoint.tensor_files import save_each
from globe.checkpoint.writer import copy_side_files, make_folder, require_space, write_file, write_index, write_json
from globe.model.configuration import expert_layers, in_json
from globe.model.dense_view import DenseView, dense_view
from globe.plan.recipe import recipe_text
from globe.run.folder import RunFolder, open_run
from globe.run.outline import waiting_bytes
from globe.terms import FAMILIES


def export_dense(model: str | Path, output: str | Path, *, overwrite: bool = False, verify: bool = True) -> Path:
    """Compose the experts of a compressed model and write them as the source had them; returns `output`.

    Names, dtypes, shapes and shards are the source's, untouched tensors bit for bit, and `quantization_config` is gone:
    the result needs no GloBE. That it is lossy, and of what, is said in its card, its config.json and the metadata of
    its shards. Its experts are composed in float32 and rounded once to the source's dtype, as the compressed model
    composes them when it is loaded in that dtype. One layer is in memory at a time, or, where it is large, in the
    unfinished output. The model's files are verified first, where they have a manifest, unless `verify` is off; an
    export that was interrupted starts over. With `overwrite`, an output that GloBE wrote earlier is replaced when the
    new one is whole.

    Raises `CheckpointError` if the model is not compressed or damaged, `OutputError` if the output exists or does not
    fit the disk.
    """
    compressed = open_checkpoint(resolve_model(model))
    dense_view(compressed)  # which refuses what it cannot be of
    if verify:
        verify_model(compressed.folder)
    run = {"command": "export", "source": str(model), "fingerprint": compressed.fingerprint()}
    with open_run(Path(output), run, overwrite=overwrite, source=compressed.folder) as folder:
        if not folder.whole():
            _write(dense_view(compressed, folder.records.folder), folder)
        folder.publish()
    return folder.output


def _write(dense: DenseView, folder: RunFolder) -> None:
    """All files of the export."""
    compressed, path = dense.compressed, folder.path
    num_bytes = sum(tensor.nbytes for tensor in dense.tensors.values())
    require_space(path, num_bytes + waiting_bytes(expert_layers(dense), len(FAMILIES)))
    report = Report.read(compressed.folder) if (compressed.folder / REPORT).is_file() else None
    description = describe_export(report, dense.run)
    files: dict[str, str] = {}
    for shard in dense.shards:
        make_folder((path / shard).parent)
        infos = aligned(dense.shard_tensors(shard))
        tensors = (tensor for _, tensor in dense.read_many(info.name for info in infos))
        files[shard] = save_each(path / shard, infos, tensors, export_metadata(description))
    if dense.shards != (SINGLE,):
        weight_map = {tensor.name: tensor.shard for tensor in dense.tensors.values()}
        files[INDEX] = write_index(path, weight_map, num_bytes)
    files |= copy_side_files(compressed, path, leave_out=(REPORT, SOURCE_LAYOUT, MANIFEST, EVALUATION))
    files[CONFIG] = write_json(path / CONFIG, {**in_json(dense.config), EXPORT: description})
    if report is not None:
        recipe = recipe_text(report.source, report.commit, report.config, report.versions.get("globe", ""))
        card = write_dense_card(report, carried_card(compressed), recipe, read_evaluations(compressed.folder))
        files[CARD] = write_file(path / CARD, card)
    open_checkpoint(path)
    folder.complete(files)
