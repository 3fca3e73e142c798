"""Trainer on the factors, as scripts/heal.py uses it, and the pipeline of a compressed model."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from globe import CompressConfig, EvaluateConfig, GlobeError, compress, evaluate, export_dense
from globe.checkpoint.report import REPORT
from globe.model.names import is_factor
from globe.plan.recipe import RECIPE
from tests.rounding import assert_equal_but_for_rounding

LEARNT = Path(__file__).parents[1] / "benchmarks" / "python_library.txt"
LITTLE = EvaluateConfig(str(LEARNT), max_tokens=1024, length=64)


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "heal.py")))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heal") / "small"
    compress("shipped", path, CompressConfig(keep=0.3, steps=2, layers=(3, 4)))
    return path


def test_healing_moves_the_factors_alone_and_lowers_the_divergence(
    small: Path, tmp_path: Path, script: SimpleNamespace
) -> None:
    healed = tmp_path / "healed"
    script.heal(script.Heal(small, healed, max_tokens=1024, length=64, batch=4, steps=8))
    before = AutoModelForCausalLM.from_pretrained(small).state_dict()
    after = AutoModelForCausalLM.from_pretrained(healed).state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]) != is_factor(name), name
    divergence = [evaluate(path, LITTLE, reference="shipped").kl for path in (small, healed)]
    assert divergence[1] is not None
    assert divergence[0] is not None
    assert divergence[1] < 0.97 * divergence[0]
    assert not (healed / REPORT).exists()
    assert {path.name for path in small.iterdir()} - {path.name for path in healed.iterdir()} == {REPORT, RECIPE}
    dense = AutoModelForCausalLM.from_pretrained(export_dense(healed, tmp_path / "dense"))
    ids = torch.arange(64)[None]
    assert_equal_but_for_rounding(dense(ids).logits, AutoModelForCausalLM.from_pretrained(healed)(ids).logits)


def test_coded_experts_cannot_be_healed(tmp_path: Path, script: SimpleNamespace) -> None:
    compress("shipped", tmp_path / "small", CompressConfig(bits=2, layers=(3,), calibrate="none", allocation="uniform"))
    with pytest.raises(GlobeError, match="no factors that can be trained"):
        script.heal(script.Heal(tmp_path / "small", tmp_path / "healed"))


def test_a_pipeline_generates_as_the_model_does(small: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small)
    ids = tokenizer("import os\n", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    expected = tokenizer.decode(model.generate(**ids, max_new_tokens=6, do_sample=False)[0])
    generator = pipeline("text-generation", model=str(small), dtype=torch.float32, device="cpu")
    assert generator("import os\n", max_new_tokens=6, do_sample=False)[0]["generated_text"] == expected
