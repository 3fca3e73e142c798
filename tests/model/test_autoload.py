"""Loading in a process that never imports globe by itself."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from globe import CompressConfig, compress, export_dense
from globe.model.autoload import AUTO_MAP, AUTOLOAD
from tests.fresh_process import FreshProcess
from tests.model.compressed import logits
from tests.rounding import assert_equal_but_for_rounding
from tests.tiny_sources import write_source

LOAD = """
import sys
from transformers import AutoModelForCausalLM, pipeline
assert "globe" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__module__, type(model).__name__)
model.save_pretrained(sys.argv[2])
"""
WITHOUT_TRUST = LOAD.replace(", trust_remote_code=True", "")
WITHOUT_PACKAGE = "import sys; sys.modules['globe'] = None\n" + LOAD.replace('assert "globe" not in sys.modules', "")


def auto_map(folder: Path) -> object:
    return json.loads((folder / "config.json").read_text()).get("auto_map")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that compress wrote."""
    folder = tmp_path_factory.mktemp("autoload")
    write_source(folder / "source")
    config = json.loads((folder / "source" / "config.json").read_text())
    remote = {"AutoConfig": "configuration_other.OtherConfig"}  # of the source: its code is not taken along
    (folder / "source" / "config.json").write_text(json.dumps({**config, "auto_map": remote}))
    compress(folder / "source", folder / "small", CompressConfig(keep=0.7, steps=2))
    return folder / "small"


def test_trusting_the_checkpoint_is_all_it_takes(fresh: FreshProcess, small: Path, tmp_path: Path) -> None:
    assert auto_map(small) == AUTO_MAP
    result = fresh.run(LOAD, small, tmp_path / "saved")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "transformers.models.qwen2_moe.modeling_qwen2_moe Qwen2MoeForCausalLM\n"
    saved = tmp_path / "saved"
    assert auto_map(saved) == AUTO_MAP
    assert [path.name for path in saved.glob("*.py")] == [AUTOLOAD]
    assert (saved / AUTOLOAD).read_bytes() == (small / AUTOLOAD).read_bytes()
    load = AutoModelForCausalLM.from_pretrained
    assert_equal_but_for_rounding(logits(load(saved)), logits(load(small)))


def test_without_trust_the_tripwire_stops_it(fresh: FreshProcess, small: Path, tmp_path: Path) -> None:
    result = fresh.run(WITHOUT_TRUST, small, tmp_path / "saved")
    assert result.returncode != 0
    assert "MISMATCH" in result.stderr
    assert not (tmp_path / "saved").exists()


def test_without_the_package_the_error_says_what_to_install(fresh: FreshProcess, small: Path, tmp_path: Path) -> None:
    result = fresh.run(WITHOUT_PACKAGE, small, tmp_path / "saved")
    assert result.returncode != 0
    assert "ImportError: the experts of this checkpoint are compressed by GloBE" in result.stderr
    assert "install GloBE and load" in result.stderr


def test_a_dense_model_has_no_use_for_it(small: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    model.dequantize()
    model.save_pretrained(tmp_path / "saved")
    export_dense(small, tmp_path / "exported")
    for folder in (tmp_path / "saved", tmp_path / "exported"):
        assert auto_map(folder) is None
        assert not (folder / AUTOLOAD).exists()


def test_a_copy_of_a_model_saves_its_own_tensors(small: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    twin.save_pretrained(tmp_path / "twin")
    assert_equal_but_for_rounding(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "twin")), logits(twin))
    assert (tmp_path / "twin" / AUTOLOAD).exists()


def test_compress_is_there_where_nothing_of_transformers_was_imported() -> None:
    done = subprocess.run([sys.executable, "-c", "import globe; globe.compress"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
