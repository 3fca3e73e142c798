"""A loaded compressed model is pickled like any other: by torch.save, by copies, for workers of another process."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from globe.model import experts
from globe.model.autoload import AUTOLOAD
from globe.model.serving import set_compose_cache
from tests.fresh_process import FreshProcess
from tests.model.compressed import FAMILY_SETTINGS, logits, token_ids
from tests.model.conftest import Make
from tests.rounding import assert_equal_but_for_rounding

IN_ANOTHER_PROCESS = """
import pickle, sys
import torch
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        model, ids = pickle.load(file)
    with torch.no_grad():
        torch.save(model(ids).logits, path + ".logits")
    model.save_pretrained(path + ".saved")
"""


def through_torch(model: PreTrainedModel) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model: PreTrainedModel) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("through", [through_torch, through_pickle, copy.deepcopy])
@pytest.mark.parametrize("model_type", FAMILY_SETTINGS)
def test_the_twin_is_whole_and_its_own(
    compressed: Make, tmp_path: Path, model_type: str, through: Callable[[PreTrainedModel], Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed(model_type).path)
    expected = logits(model)
    twin = through(model)
    assert_equal_but_for_rounding(logits(twin), expected)
    assert [name for name, _ in twin.named_parameters(remove_duplicate=False)] == [
        name for name, _ in model.named_parameters(remove_duplicate=False)
    ]
    banks = {id(bank) for bank in twin.model.globe_banks.values()}
    used = {id(use.bank) for layer in twin.model.layers for use in layer.mlp.experts.globe_uses}
    assert banks <= used  # the bank that layers share is still one
    with torch.no_grad():
        next(iter(twin.model.globe_banks.values())).bases.zero_()
    assert (logits(twin) - expected).abs().max() > 1e-2
    assert_equal_but_for_rounding(logits(model), expected)
    twin.save_pretrained(tmp_path)
    assert (tmp_path / AUTOLOAD).exists()
    assert_equal_but_for_rounding(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(twin))
    twin.dequantize()
    assert not [name for name, _ in twin.named_modules() if "globe" in name]


def test_its_classes_are_made_where_it_is_loaded(compressed: Make, fresh: FreshProcess, tmp_path: Path) -> None:
    """Another process, which imports what the pickles import and nothing else."""
    paths = list[Path]()
    models = [AutoModelForCausalLM.from_pretrained(compressed(family).path) for family in ("qwen2_moe", "mixtral")]
    for model in models:
        paths.append(tmp_path / str(len(paths)))
        paths[-1].write_bytes(pickle.dumps((model, token_ids())))
    result = fresh.run(IN_ANOTHER_PROCESS, *paths)
    assert result.returncode == 0, result.stderr
    for model, path in zip(models, paths, strict=True):
        assert_equal_but_for_rounding(torch.load(f"{path}.logits"), logits(model))
        saved = AutoModelForCausalLM.from_pretrained(f"{path}.saved")
        assert (Path(f"{path}.saved") / AUTOLOAD).exists()
        assert_equal_but_for_rounding(logits(saved), logits(model))


def test_composed_experts_stay_behind(compressed: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed("qwen2_moe").path)
    plain = len(pickle.dumps(model))
    cache = set_compose_cache(model, 10**6)
    expected = logits(model)
    assert cache.resident_bytes > 0
    pickled = pickle.dumps(model)
    assert len(pickled) - plain < 1000 < cache.resident_bytes
    for twin in (pickle.loads(pickled), copy.deepcopy(model)):
        kept: nn.Module = twin.model.layers[0].mlp.experts
        assert isinstance(kept, experts.GlobeExperts)
        assert kept.globe_cache is not None
        assert kept.globe_cache.resident_bytes == 0
        assert_equal_but_for_rounding(logits(twin), expected)
        assert kept.globe_cache.resident_bytes > 0  # the budget was taken along
