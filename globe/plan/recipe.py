"""A run as a recipe: YAML with the model and the settings, which repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

RECIPE = "recipe.yaml"


def recipe_text(model: str, revision: str | None, settings: Mapping[str, Any], version: str) -> str:
    """The recipe of a run with resolved settings, as JSON holds them, by a version of GloBE."""
    content = {"model": model, "revision": revision, **settings}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True)
    return f"# of GloBE {version}\n{text}"
