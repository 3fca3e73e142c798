"""Several outputs side by side, from their records alone."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from globe.checkpoint.evaluation import Evaluation, read_evaluations
from globe.checkpoint.report import Report
from globe.checkpoint.writer import write_file
from globe.errors import SettingsError
from globe.report.style import STYLE, plain_log_ticks
from globe.terminal import Terminal, visible
from globe.units import byte_size, with_error


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A compressed model and what was measured of it."""

    name: str
    report: Report
    evaluation: Evaluation | None
    """On the text on which most candidates were judged."""

    @property
    def stored(self) -> str:
        """What is stored of its experts."""
        return f"keep {self.report.kept:.3f}" if self.report.bits is None else f"{self.report.bits:.2f}"


def read_candidates(folders: Sequence[Path]) -> list[Candidate]:
    """The candidates by size; raises `CheckpointError` for a folder that is no output of compress, and `SettingsError`
    for outputs of different sources."""
    reports = {folder: Report.read(folder) for folder in folders}
    if len(fingerprints := {report.fingerprint for report in reports.values()}) > 1:
        raise SettingsError(
            f"these are of {len(fingerprints)} different sources: compare outputs that were compressed from one"
        )
    records = {
        folder: {each.fingerprint: each for each in read_evaluations(folder) if each.reference == "the original"}
        for folder in folders
    }
    texts = Counter(text for record in records.values() for text in record)
    text = texts.most_common(1)[0][0] if texts else None
    found = [Candidate(folder.resolve().name, reports[folder], records[folder].get(text)) for folder in folders]
    return sorted(found, key=lambda candidate: candidate.report.compressed_bytes)


def show_comparison(console: Terminal, folders: Sequence[Path], picture: Path | None) -> None:
    """Print the table and draw the picture."""
    candidates = read_candidates(folders)
    console.print(comparison_table(candidates))
    if any(candidate.evaluation is not None and candidate.evaluation.tasks for candidate in candidates):
        console.print(table_of_tasks(candidates))
    if missing := [candidate.name for candidate in candidates if candidate.evaluation is None]:
        console.print(
            f"not judged on that text: {', '.join(missing)}; globe evaluate does it", style="yellow", soft_wrap=True
        )
    if picture is not None:
        write_file(picture, draw_comparison(candidates, picture.suffix.removeprefix(".") or "png"))
        console.print(f"drawn in {picture}", soft_wrap=True)


def comparison_table(candidates: Sequence[Candidate]) -> Table:
    """The original and every candidate, the largest first."""
    judged = [candidate.evaluation for candidate in candidates if candidate.evaluation is not None]
    title = f"{judged[0].num_tokens} tokens of {judged[0].text}" if judged else "not judged yet"
    table = Table(title=visible(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "bits", "size", "KL (nats per token)", "perplexity", "same next token"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    theirs = next((each.reference_perplexity for each in judged if each.reference_perplexity is not None), None)
    size = byte_size(candidates[0].report.original_bytes)
    table.add_row("original", "", size, "0", "" if theirs is None else f"{theirs:.3f}", "100%")
    for candidate in reversed(candidates):
        each, size = candidate.evaluation, byte_size(candidate.report.compressed_bytes)
        quality = ["", "", ""]
        if each is not None and each.kl is not None and each.agreement is not None:
            quality = [with_error(each.kl, each.kl_error), f"{each.perplexity:.3f}", f"{each.agreement:.2%}"]
        table.add_row(candidate.name, candidate.stored, size, *quality)
    return table


def table_of_tasks(candidates: Sequence[Candidate]) -> Table:
    """A row for each score on a task of lm-eval, a column for the original and each candidate, the largest first."""
    table = Table(title="tasks of lm-eval", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "original", *(candidate.name for candidate in reversed(candidates))):
        table.add_column(visible(name), justify="right" if name else "left")
    scores = [
        {} if each.evaluation is None else {score.name: score for score in each.evaluation.tasks}
        for each in reversed(candidates)
    ]
    for name in dict.fromkeys(name for each in scores for name in each):
        row = [each.get(name) for each in scores]
        theirs = next((score.reference for score in row if score is not None and score.reference is not None), None)
        cells = ["" if score is None else with_error(score.value, score.error) for score in row]
        table.add_row(visible(name), "" if theirs is None else f"{theirs:.5f}", *cells)
    return table


def draw_comparison(candidates: Sequence[Candidate], suffix: str = "png") -> bytes:
    """KL to the original against the bytes of the whole model, each candidate by its name.

    Raises `SettingsError` where none was judged, or for a kind of picture that matplotlib does not write.
    """
    judged = [(each, each.evaluation) for each in candidates if each.evaluation is not None and each.evaluation.kl]
    if not judged:
        raise SettingsError("there is nothing to draw: judge the outputs with globe evaluate first")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        if suffix not in figure.canvas.get_supported_filetypes():
            raise SettingsError(f"a picture cannot be written as .{suffix}: choose png, svg or pdf")
        axes = figure.subplots()
        size = [each.report.compressed_bytes / each.report.original_bytes for each, _ in judged]
        divergence = [evaluation.kl or 0.0 for _, evaluation in judged]
        errors = [evaluation.kl_error or 0.0 for _, evaluation in judged]
        axes.errorbar(size, divergence, yerr=errors, fmt="o", capsize=2)
        for place, value, (each, _) in zip(size, divergence, judged, strict=True):
            axes.annotate(
                visible(each.name), (place, value), (5, 5), textcoords="offset points", parse_math=False, fontsize=8
            )
        axes.margins(x=0.15)
        axes.set_title("KL to the original, nats per token; bars: standard error")
        text = f"judged on {judged[0][1].num_tokens} tokens of {judged[0][1].text}"
        figure.suptitle(visible(text), x=0.01, horizontalalignment="left", fontsize=11, parse_math=False)
        axes.set_xlabel("bytes of the whole model, share of the original's")
        axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))  # pyright: ignore[reportAttributeAccessIssue]
        if max(divergence) > 5 * min(divergence):
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis)
        else:
            axes.set_ylim(bottom=0)
        picture = io.BytesIO()
        figure.savefig(picture, format=suffix)
    return picture.getvalue()
