"""Factors in few bits, from the settings to the loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from globe import CheckpointError, CompressConfig, compress
from globe.bank.factors import Factors
from globe.bank.precision import Precision
from globe.bank.rounding import decode
from globe.checkpoint.reader import open_checkpoint
from globe.experts.stack import ExpertStack, Group
from globe.experts.storage import to_storage
from globe.model.bank_module import Bank
from globe.model.names import is_factor
from globe.report.inventory import read_spectra
from globe.train.config import FitConfig
from globe.train.fit_banks import fit_bank
from tests.random_experts import normal, planted_alignment
from tests.rounding import assert_equal_but_for_rounding
from tests.tiny_sources import write_source

IDS = torch.tensor([[3, 5, 7, 11, 13, 17, 19, 23]])


@pytest.fixture
def experts() -> torch.Tensor:
    """Experts that share a bank, and noise."""
    planted = planted_alignment(num_experts=24, rows=8, columns=40, rank=8, num_bases=6)
    return (planted / planted.std() + normal(24, 8, 40, seed=9)).float()


def stored_error(experts: torch.Tensor, factors: Factors, precision: Precision) -> float:
    stack = ExpertStack(experts, (Group(0, "gate", slice(0, len(experts)), 1.0),))
    return to_storage(stack, factors, torch.float32, precision).errors[0, "gate"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_bank_rounded_inside_the_fit_loses_less_than_one_rounded_after_it(experts: torch.Tensor, bits: int) -> None:
    after = fit_bank(experts, FitConfig(rank=8, num_bases=12, max_steps=200)).factors
    inside = fit_bank(experts, FitConfig(rank=8, num_bases=12, max_steps=200, bank_bits=bits))
    precision = Precision(bases=bits)
    error = stored_error(experts, inside.factors, precision)
    assert error < 0.95 * stored_error(experts, after, precision)
    # what the history promises is what is stored
    assert error == pytest.approx(inside.history[-1], rel=1e-4)
    assert all(later <= earlier for earlier, later in zip(inside.history, inside.history[1:], strict=False))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_adapters_lose_no_more_than_their_bits_allow(experts: torch.Tensor, bits: int) -> None:
    factors = fit_bank(experts, FitConfig(rank=8, num_bases=4, max_steps=60)).factors
    exact = stored_error(experts, factors, Precision())
    rounded = stored_error(experts, factors, Precision(adapters=bits))
    distortion = {2: 0.118, 3: 0.035, 4: 0.0095, 5: 0.0025, 8: 1e-4}[bits]  # of a normal distribution, in its variance
    assert exact < rounded < (exact**2 + 2 * distortion) ** 0.5


@pytest.mark.parametrize("bits", [2.5, 3, 4, 5, 8])
def test_a_budget_of_bits_holds_for_the_files(tmp_path: Path, bits: float) -> None:
    write_source(tmp_path / "source")
    report = compress(tmp_path / "source", tmp_path / "out", CompressConfig(bits=bits, scope="model", steps=3))
    factors = [tensor for tensor in open_checkpoint(tmp_path / "out").tensors.values() if is_factor(tensor.name)]
    assert {tensor.dtype for tensor in factors} == {"U8"}
    stored = 8 * sum(tensor.nbytes for tensor in factors)
    original = sum(bank.original_parameters for bank in report.banks)
    assert 0.9 * bits < stored / original <= bits


def test_the_loaded_model_stays_packed_and_survives_saving(tmp_path: Path) -> None:
    write_source(tmp_path / "source", dtype=torch.bfloat16)
    compress(tmp_path / "source", tmp_path / "out", CompressConfig(keep=0.7, factor_dtype="int4", steps=3))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    factors = {name: parameter for name, parameter in model.named_parameters() if is_factor(name)}
    assert factors
    assert {parameter.dtype for parameter in factors.values()} == {torch.uint8}
    assert not any(parameter.requires_grad for parameter in factors.values())
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.bfloat16).eval()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    with torch.no_grad():
        assert_equal_but_for_rounding(again(input_ids=IDS).logits, expected)


def test_it_becomes_dense_in_memory(tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "out", CompressConfig(keep=0.7, factor_dtype="int4", steps=3))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "copy")  # leaves the dtype's name in its config
    dense = model.dequantize()
    assert not any(is_factor(name) for name in dense.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(dense(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


def test_factors_of_another_width_are_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "out", CompressConfig(keep=0.7, factor_dtype="int4", steps=3))
    config = (tmp_path / "out" / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(config.replace('"int4"', '"int3"'))
    with pytest.raises(CheckpointError, match="wrong shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_page_on_a_model_in_few_bits_has_the_spectra_of_its_factors(tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    settings = CompressConfig(keep=0.7, factor_dtype="int5", bank_dtype="int4", steps=3, layers=(0,))
    compress(tmp_path / "source", tmp_path / "out", settings)
    compressed = open_checkpoint(tmp_path / "out")
    (spectra,) = read_spectra(compressed)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    (bank,) = (module for module in model.modules() if isinstance(module, Bank))
    bases = decode(bank.bases, bank.hidden_size, 4).flatten(1).double()
    singular = torch.linalg.svdvals(bases)
    assert spectra.bases == pytest.approx((singular / singular[0]).tolist(), rel=1e-5)
