"""What inspect prints, and compress before it begins: what headers say of a model and of its compression.

What runs models takes seconds to import, and is imported where a model is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from globe.checkpoint.layout import dtype_notes
from globe.checkpoint.report import Report, is_compressed
from globe.checkpoint.shipped import resolve_model
from globe.errors import SettingsError
from globe.plan.scopes import compact, make_plan
from globe.plan.settings import CompressConfig
from globe.run.observer import describe
from globe.run.outline import Outline, check_reach, confirmed, first_look
from globe.run.outlook import Outlook, look_ahead
from globe.run.ranks import ALONE, Ranks
from globe.terminal import Terminal
from globe.units import byte_size

_BITS, _KEEPS = (2.0, 2.5, 3.0, 4.0, 6.0), (0.75, 0.5)
"""Budgets that inspect shows."""


def show_inspection(
    console: Terminal,
    model: str,
    config: CompressConfig,
    revision: str | None = None,
    cache: Path | None = None,
    passing: Path | None = None,
    *,
    plan: bool = False,
) -> None:
    """A model's experts, what each budget gives, and what a compression with these settings will take, from headers
    alone; with `plan` also what running the model tells."""
    folder = resolve_model(model)
    if is_compressed(str(folder)):
        _show_compressed(console, Report.read(Path(folder)))
        return
    outlined = first_look(model, config, revision, cache, passing)
    notes, outlook = _show_headers(console, outlined)
    if (meant := confirmed(outlined)) is not outlined:
        console.print("note: transformers reads this config.json otherwise, and so it is:", style="yellow")
        notes, outlook = _show_headers(console, meant)
    console.print(outlook.takes(), soft_wrap=True)
    if plan:
        from globe.report.show import show_prepared
        from globe.run.job import make_job

        show_prepared(console, make_job(model, config, revision, cache), notes)


def _show_headers(console: Terminal, outlined: Outline) -> tuple[list[str], Outlook]:
    """All that headers tell at once, without the time that a compression takes; returns the notes, and what knows the
    time."""
    _show_experts(console, outlined)
    console.print(_table_of_budgets(outlined))
    first = next(iter(outlined.layers.values()))
    ratio = first.intermediate_size / first.hidden_size
    if not outlined.config.is_coded and ratio >= 0.9:
        console.print(
            f"note: these experts are coarse (P/D = {ratio:.2f}). The bank is shared along D and every adapter carries "
            "P, so expect a high error unless little is removed; look at the errors of one layer first (--layers)",
            style="yellow",
            soft_wrap=True,
        )
    checkpoint = outlined.checkpoint
    notes = [*checkpoint.notes, *dtype_notes(outlined.layers.values()), *checkpoint.side_files().left_out]
    show_notes(console, notes)
    outlook = look_ahead(outlined)
    _show_needs(console, outlook)
    return notes, outlook


def show_outlook(console: Terminal, outlined: Outline, output: Path | None = None, ranks: Ranks = ALONE) -> None:
    """What a compression will read, write, need and take, in four lines, and what will not go as asked."""
    outlook = look_ahead(outlined, output, ranks)
    _show_needs(console, outlook)
    console.print(outlook.takes(), soft_wrap=True)


def _show_needs(console: Terminal, outlook: Outlook) -> None:
    for line in outlook.lines():
        console.print(line, style="yellow" if line.startswith("note") else "none", soft_wrap=True)


def show_notes(console: Terminal, notes: Iterable[str]) -> None:
    """What was passed over in the model's files, or done otherwise than asked."""
    for note in notes:
        console.print(f"note            {note}", style="yellow", soft_wrap=True)


def _show_experts(console: Terminal, outlined: Outline) -> None:
    checkpoint, layers = outlined.checkpoint, [*outlined.layers.values()]
    first, name = layers[0], checkpoint.folder if checkpoint.repo is None else checkpoint.repo.repo_id
    table = Table(title=f"{name}: {checkpoint.config.get('model_type')}")
    for name in ("layers", "experts", "P (rows)", "D (columns)", "P/D", "dtype", "on disk"):
        table.add_column(name, justify="right")
    table.add_row(
        compact([layer.index for layer in layers]),
        str(first.num_experts),
        str(first.intermediate_size),
        str(first.hidden_size),
        f"{first.intermediate_size / first.hidden_size:.3f}",
        first.dtype,
        first.layout.replace("_", " "),
    )
    console.print(table)


def _table_of_budgets(outlined: Outline) -> Table:
    """The whole model's bytes by budget."""
    table = Table(title="budgets")
    for name in ("budget", "whole model", "of the original", "rank", "bases"):
        table.add_column(name, justify="right")
    original, unchanged = outlined.original_bytes(), outlined.kept_bytes()
    kept = CompressConfig(families=outlined.config.families, layers=outlined.config.layers)
    budgets = [dataclasses.replace(kept, bits=bits) for bits in _BITS]
    budgets += [dataclasses.replace(kept, keep=keep) for keep in _KEEPS]
    for config in budgets:
        name = f"--bits {config.bits:g}" if config.keep is None else f"--keep {config.keep:g}"
        try:
            scopes = tuple(make_plan(list(outlined.layers.values()), config))
            at = dataclasses.replace(outlined, config=config, scopes=scopes)
            check_reach(at)
        except SettingsError:
            table.add_row(name, "out of reach", "", "", "")
            continue
        stored, shape = unchanged + at.made_bytes(scopes), scopes[0].banks[0].shape if scopes[0].banks else None
        sizes = ("", "") if shape is None else (str(shape.rank), str(shape.num_bases))
        table.add_row(name, byte_size(stored), f"{stored / original:.1%}", *sizes)
    return table


def _show_compressed(console: Terminal, report: Report) -> None:
    title = f"compressed from {report.source}"
    console.print(_table_of_banks(title, report) if report.banks else _table_of_coded(title, report))
    stored = (
        f"kept {report.kept:.4f} of the compressed families"
        if report.bits is None
        else f"{report.bits:.3f} bits a weight of the compressed families"
    )
    console.print(f"{stored}; whole model {byte_size(report.original_bytes)} -> {byte_size(report.compressed_bytes)}")


def _table_of_banks(title: str, report: Report) -> Table:
    table = Table(title=title)
    for name in ("bank", "rank", "bases", "error", "outcome"):
        table.add_column(name, justify="right")
    for bank in report.banks:
        table.add_row(
            describe(bank),
            str(bank.shape.rank),
            str(bank.shape.num_bases),
            f"{bank.error:.4f}",
            bank.outcome,
        )
    return table


def _table_of_coded(title: str, report: Report) -> Table:
    table = Table(title=title)
    for name in ("layer", "family", "bits", "bases", "error"):
        table.add_column(name, justify="right")
    for part in report.coded:
        table.add_row(str(part.layer), part.family, f"{part.bits:.2f}", str(part.num_bases), f"{part.error:.4f}")
    return table
