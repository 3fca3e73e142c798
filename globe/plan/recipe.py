"""A run as a recipe: YAML with the model and all settings of a compression, which repeats it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from globe.errors import SettingsError
from globe.plan.settings import CompressConfig
from globe.typed import shown

RECIPE = "recipe.yaml"
BUDGET = ("keep", "bits", "rank_ratio", "basis_ratio")
"""Settings of which one replaces the others."""
_LARGEST = 1 << 20


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe says."""

    model: str
    revision: str | None
    """Branch, tag or commit of a model on the Hub."""
    config: CompressConfig


def recipe_text(model: str, revision: str | None, settings: Mapping[str, Any], version: str) -> str:
    """The recipe of a run with resolved settings, as JSON holds them, by a version of GloBE."""
    content = {"model": model, "revision": revision, **settings}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True)
    return f"# of GloBE {version}\n{text}"


def read_recipe(path: str | Path, leave_out: Collection[str] = ()) -> Recipe:
    """Read a recipe: `model`, which is `shipped` where it is not said, `revision`, and fields of `CompressConfig`, but
    for those in `leave_out`; what is not said has its default.

    Raises `SettingsError` naming the file, and the field that is unknown or out of its range.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise SettingsError(f"recipe {path} is not a file: give the recipe.yaml of an output, or one of your own")
        with path.open("rb") as file:
            content = yaml.safe_load(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"recipe {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"recipe {path} holds {shown(content)}, not settings by name")
    known = [field.name for field in dataclasses.fields(CompressConfig)]
    if unknown := [name for name in content if name not in ("model", "revision", *known)]:
        raise SettingsError(
            f"recipe {path} has {shown(unknown[0])}, which is no setting of a compression; known are model, revision, "
            f"{', '.join(known)}"
        )
    model, revision = content.get("model", "shipped"), content.get("revision")
    if not isinstance(model, str) or not isinstance(revision, str | None):
        raise SettingsError(f"recipe {path}: model and revision must be text; found {shown(model)}, {shown(revision)}")
    try:
        config = CompressConfig(**{name: content[name] for name in known if name in content and name not in leave_out})
    except SettingsError as error:
        raise SettingsError(f"recipe {path}: {error}") from error
    return Recipe(model, revision, config)
