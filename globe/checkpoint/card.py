"""The model card of an output: what it was made of and how, what it loses, how to load it; the source's card below."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from globe.checkpoint.evaluation import Evaluation, record_evaluation
from globe.checkpoint.manifest import write_listed
from globe.checkpoint.reader import Checkpoint
from globe.checkpoint.report import Report
from globe.checkpoint.shipped import resolve_model
from globe.units import byte_size, with_error

CARD = "README.md"
EXPORT = "globe_export"
"""In config.json and the metadata of the shards of a dense export: that it is lossy, and of what."""

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_KEPT = ("language", "license", "license_name", "license_link", "pipeline_tag", "datasets")
"""Of the source's metadata, beside its tags."""
_TAGS, _NATIVE, _DENSE = ("globe", "mixture-of-experts"), "compressed", "lossy-dense-export"
_PACKED = "compressed-tensors"
"""The tag of an output in that format, and its name in the settings."""
_MEASURED = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.DOTALL)
_SOURCE = "<!-- what follows is the source's card, as it was -->"
_LARGEST = 1 << 20


@dataclasses.dataclass(frozen=True)
class SourceCard:
    """The card of a source, which may be whatever someone wrote."""

    metadata: Mapping[str, str | list[str]]
    """What of it holds for an output, too; empty where it cannot be read."""
    text: str
    """Markdown."""


def read_source_card(checkpoint: Checkpoint) -> SourceCard | None:
    """The card among a checkpoint's side files, if it has one."""
    path = next((path for path in checkpoint.side_files().kept if path.name == CARD), None)
    if path is None or path.stat().st_size > _LARGEST:
        return None
    content = path.read_text(encoding="utf-8-sig", errors="replace")
    if not content.lstrip().startswith("---"):
        return SourceCard({}, content)
    try:
        card = ModelCard(content, ignore_metadata_errors=True)
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return SourceCard({}, content)
    found = {key: card.data.get(key) for key in (*_KEPT, "tags")}
    return SourceCard({key: value for key, value in found.items() if _is_text(value)}, card.text)


def carried_card(compressed: Checkpoint) -> SourceCard | None:
    """The source's card as the card of a compressed model carries it."""
    card = read_source_card(compressed)
    if card is None or _SOURCE not in card.text:
        return None
    tags = [tag for tag in card.metadata.get("tags", []) if tag not in (*_TAGS, _NATIVE, _PACKED)]
    return SourceCard({**card.metadata, "tags": tags}, card.text.partition(_SOURCE)[2])


def write_native_card(report: Report, source: SourceCard | None, recipe: str) -> bytes:
    """The card of a compressed model, in GloBE's own format or another; `recipe` repeats the run."""
    return _render(report, source, recipe, (), is_dense=False)


def write_dense_card(
    report: Report, source: SourceCard | None, recipe: str, evaluations: Sequence[Evaluation]
) -> bytes:
    """The card of its dense export, of which all that was measured of the model holds."""
    return _render(report, source, recipe, evaluations, is_dense=True)


def keep_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Record an evaluation in a finished folder, and tell it in its card, if that is still GloBE's.

    `OutputError` if the folder cannot be written.
    """
    kept, path = record_evaluation(folder, evaluation), folder / CARD
    if not path.is_file() or path.stat().st_size > 2 * _LARGEST:
        return
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return
    own, mark, theirs = card.text.partition(_SOURCE)
    if _MEASURED.search(own) is None:
        return
    card.text = _MEASURED.sub(lambda _: _measured(kept), own, count=1) + mark + theirs
    card.data["eval_results"] = _results(kept)
    card.data["model_name"] = own.strip().partition("\n")[0].removeprefix("# ")
    write_listed(folder, CARD, str(card).encode(errors="backslashreplace"))


def _measured(evaluations: Sequence[Evaluation]) -> str:
    """What was measured, in Markdown."""
    if not evaluations:
        return ""
    rows = [
        [
            _word(each.text),
            str(each.num_tokens),
            "" if each.kl is None else with_error(each.kl, each.kl_error),
            _word(each.reference),
            "" if each.agreement is None else f"{each.agreement:.2%}",
            f"{each.perplexity:.3f}",
            "" if each.reference_perplexity is None else f"{each.reference_perplexity:.3f}",
        ]
        for each in evaluations
    ]
    head = "| text | tokens | KL, nats per token | to | same next token | perplexity | the reference's |"
    return "\n".join(
        [
            "## Measured",
            "",
            head,
            f"|{7 * '---|'}",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *_tasks(evaluations),
            "By `globe evaluate`.",
            "",
        ]
    )


def _tasks(evaluations: Sequence[Evaluation]) -> list[str]:
    """Lines of a table of lm-eval's tasks, where some were run."""
    rows = [
        [
            _word(score.name),
            with_error(score.value, score.error),
            "" if score.reference is None else f"{score.reference:.4f}",
            _word(each.reference),
        ]
        for each in evaluations
        for score in each.tasks
    ]
    head = "| task of lm-eval | score | the reference's | reference |"
    return [head, f"|{4 * '---|'}", *(f"| {' | '.join(row)} |" for row in rows), ""] if rows else []


def _results(evaluations: Sequence[Evaluation]) -> list[EvalResult]:
    """The same as the Hub reads it, of each text the latest."""
    latest = {_word(each.text): each for each in evaluations}
    metrics = {
        "perplexity": "Perplexity",
        "kl": "KL(reference || model), nats per token",
        "agreement": "Share of tokens with the reference's most likely next token",
    }
    of_tasks = {score.name: score for each in evaluations for score in each.tasks}
    return [
        EvalResult("text-generation", text, text, metric, getattr(each, metric), metric_name=name)
        for text, each in latest.items()
        for metric, name in metrics.items()
        if getattr(each, metric) is not None
    ] + [
        EvalResult("text-generation", score.task, score.task, score.metric, score.value) for score in of_tasks.values()
    ]


def _word(text: str | None) -> str:
    """A name that a table can hold."""
    return " ".join((text or "").replace("|", "/").split())


def describe_export(report: Report | None, run: str | None) -> dict[str, Any]:
    """What a dense export says of itself to programs; little where the report is gone, as of a healed model."""
    said: dict[str, Any] = {"lossy": True, "run": run}
    if report is not None:
        said |= {
            "source": _named(report),
            "source_commit": report.commit,
            "source_fingerprint": report.fingerprint,
            "bits_per_expert_weight": report.bits,
            "kept_expert_parameters": report.kept if report.bits is None else None,
            "globe_version": report.versions.get("globe"),
        }
    return said


def export_metadata(description: Mapping[str, Any]) -> dict[str, str]:
    """The same as the metadata of a safetensors file."""
    return {EXPORT: json.dumps(description)}


def _render(
    report: Report, source: SourceCard | None, recipe: str, evaluations: Sequence[Evaluation], *, is_dense: bool
) -> bytes:
    metadata = dict(source.metadata) if source is not None else {}
    is_packed = report.config.get("format") == _PACKED
    kind = _DENSE if is_dense else _PACKED if is_packed else _NATIVE
    on_hub = report.commit is not None
    tags = metadata.pop("tags", [])
    name = " ".join(_named(report).rpartition("/")[2].split())
    how = f"{report.bits:.2f} bits a weight" if report.bits is not None else f"{report.kept:.2f} of their parameters"
    data = ModelCardData(
        base_model=report.source if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name="transformers",
        model_name=f"{name}, experts in {how}",
        eval_results=_results(evaluations) or None,
        tags=[*_TAGS, kind, *([tags] if isinstance(tags, str) else tags)],
        **metadata,  # pyright: ignore[reportArgumentType]
    )
    template = jinja2.Template(
        _TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = template.render(
        card_data=data.to_yaml(),
        report=report,
        version=report.versions.get("globe", "of an unknown version"),
        name=name,
        link=f"[{report.source}](https://huggingface.co/{report.source})" if on_hub else name,
        how=how,
        measured=_measured(evaluations),
        families=report.family_errors(),
        is_dense=is_dense,
        is_packed=is_packed,
        widths=_widths(report) if is_packed else {},
        original=byte_size(report.original_bytes),
        compressed=byte_size(report.compressed_bytes),
        recipe=recipe.rstrip(),
        source=source,
        mark=_SOURCE,
        license=metadata.get("license"),
    )
    return f"{text.rstrip()}\n".encode(errors="backslashreplace")


def _widths(report: Report) -> dict[str, str]:
    """Bits, and the layers that have them."""
    layers: dict[str, list[str]] = {}
    for layer, width in sorted({(part.layer, part.expert_widths[0]) for part in report.coded}):
        layers.setdefault(f"{width:g}", []).append(str(layer))
    return {width: ", ".join(layers[width]) for width in sorted(layers)}


def _named(report: Report) -> str:
    """The source as others know it: its id on the Hub, or the name of its folder."""
    return report.source if report.commit is not None else Path(resolve_model(report.source)).name


def _is_text(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(entry, str) for entry in values)
