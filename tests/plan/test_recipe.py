from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from globe import CompressConfig, SettingsError, read_recipe
from globe.cli.main import main
from globe.plan.recipe import recipe_text
from globe.run.records import as_json
from tests.coded import ALONE, write_source

CONFIGS = st.builds(
    CompressConfig,
    bits=st.floats(1.5, 8),
    layers=st.none() | st.lists(st.integers(0, 99), min_size=1, unique=True).map(tuple),
    families=st.sets(st.sampled_from(["gate", "up", "down"]), min_size=1).map(tuple),
    calibrate=st.text(min_size=1),
    seed=st.integers(0, 2**40),
    trust_remote_code=st.booleans(),
) | st.builds(CompressConfig, keep=st.floats(0.001, 0.999), scope=st.sampled_from(["layer", "model", "3"]))


@given(CONFIGS, st.text(min_size=1), st.none() | st.text())
def test_a_recipe_is_read_as_it_was_written(config: CompressConfig, model: str, revision: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipe_text(model, revision, as_json(dataclasses.asdict(config)), "1"), encoding="utf-8")
        recipe = read_recipe(path)
    assert (recipe.model, recipe.revision, recipe.config) == (model, revision, config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: 3\nbit: 2", "has 'bit', which is no setting of a compression; known are model, revision, keep"),
        ("bits: many", "bits is 'many'"),
        ("bits: 9", "must be from 1.5 to 8"),
        ("- bits", "not settings by name"),
        ("bits: [", "cannot be read as YAML"),
        ("model: 3", "model and revision must be text"),
    ],
)
def test_what_is_no_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message) as found:
        read_recipe(tmp_path / "recipe.yaml")
    assert str(tmp_path / "recipe.yaml") in str(found.value)
    with pytest.raises(SettingsError, match="is not a file"):
        read_recipe(tmp_path)


def test_a_recipe_repeats_a_run_to_the_last_byte_and_what_is_given_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "source")
    given = ("--bits", "2.5", "--calibrate", "none", "--allocation", "uniform", "--layers", "1", "--families", "up")
    assert main(["compress", str(tmp_path / "source"), "-o", str(tmp_path / "first"), *given]) == 0
    recipe = str(tmp_path / "first" / "recipe.yaml")
    assert main(["compress", "--recipe", recipe, "-o", str(tmp_path / "again")]) == 0
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names - {"report.json", "globe_manifest.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()

    changed = ("-o", str(tmp_path / "other"), "--keep", "0.8", "--steps=1")
    assert main(["compress", f"--recipe={recipe}", *changed]) == 0
    other = read_recipe(tmp_path / "other" / "recipe.yaml").config
    config = dataclasses.replace(ALONE, bits=None, keep=0.8, steps=1, layers=(1,), families=("up",), device="cpu")
    assert other == config
    capsys.readouterr()
    assert main(["compress", "--recipe", str(tmp_path / "none.yaml"), "-o", str(tmp_path / "x")]) == 1
    assert "none.yaml is not a file" in capsys.readouterr().err
