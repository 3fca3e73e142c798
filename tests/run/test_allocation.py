"""What the short fits say of the full ones, and what errors cost: on the shipped model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from globe.bank_shape import BankShape
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.checkpoint.shipped import MODEL
from globe.experts.stack import read_stack
from globe.measure.evaluate import read_windows
from globe.measure.settings import EvaluateConfig
from globe.model.configuration import expert_layers
from globe.model.expert_modules import find_experts
from globe.model.loading import load
from globe.plan.allocate import DAMPING, ERROR_POWER, REACH, STEP
from globe.plan.budget import Keep
from globe.plan.scopes import make_plan
from globe.plan.settings import CompressConfig
from globe.run import allocation
from globe.run.allocation import measure_curve
from globe.train.fit_banks import fit_bank
from tests.random_experts import normal


@pytest.fixture(scope="module")
def shipped() -> Checkpoint:
    return open_checkpoint(MODEL)


def only_bank(shipped: Checkpoint, config: CompressConfig) -> tuple[BankShape, Tensor]:
    """The shape of the one bank of a configuration, and its experts."""
    layers = {layer.index: layer for layer in expert_layers(shipped)}
    (scope,) = make_plan(list(layers.values()), config)
    (bank,) = scope.banks
    return bank.shape, read_stack(shipped, layers, bank).weights


@pytest.mark.parametrize(
    ("settings", "keeps", "tolerance"),
    [
        ({"layers": (3,), "steps": 60}, (0.27, 0.5, 0.73), 0.025),
        ({"layers": (3,), "families": ("up",), "steps": 500}, (0.27, 0.6), 0.04),
    ],
)
def test_predicted_errors_are_those_of_whole_fits(
    shipped: Checkpoint, settings: dict[str, object], keeps: tuple[float, ...], tolerance: float
) -> None:
    """At the ends of what a bank is offered and in the middle, whatever the number of steps."""
    config = CompressConfig(keep=0.5, device="cpu", **settings)  # pyright: ignore[reportArgumentType]
    bank, experts = only_bank(shipped, config)
    curve = measure_curve(experts, bank, config)
    for option in (Keep(keep).shape_for(bank.matrices) for keep in keeps):
        error = fit_bank(experts, config.fit_config(option)).history[-1]
        predicted = curve(option.share)
        assert predicted == pytest.approx(error, rel=tolerance), option


@torch.no_grad()
def test_errors_cost_about_their_cube(shipped: Checkpoint) -> None:
    """The divergence of the model with one layer compressed, at two sizes; for noise it would be the square."""
    windows = read_windows(MODEL, EvaluateConfig(text="calibration", max_tokens=16384))[0][::16]
    model, layer = load(MODEL, "cpu", torch.float32), 13
    (module,) = (experts.module for experts in find_experts(model) if experts.layer == layer)

    def log_probabilities() -> Tensor:
        return torch.cat([model(input_ids=window[None]).logits.log_softmax(-1) for window in windows])

    config = CompressConfig(keep=0.5, layers=(layer,), steps=30, device="cpu")
    bank, experts = only_bank(shipped, config)
    sigmas = [float(part.square().mean().sqrt()) for part in (*module.gate_up_proj.chunk(2, dim=1), module.down_proj)]
    true, errors, costs = log_probabilities(), list[float](), list[float]()
    for option in (Keep(0.35).shape_for(bank.matrices), Keep(0.6).shape_for(bank.matrices)):
        fit = fit_bank(experts, config.fit_config(option))
        families = fit.factors.compose().chunk(3)
        gate, up, down = (sigma * part for sigma, part in zip(sigmas, families, strict=True))
        module.gate_up_proj.copy_(torch.cat([gate, up], dim=1))
        module.down_proj.copy_(down.mT)
        errors.append(fit.history[-1])
        costs.append(float((true.exp() * (true - log_probabilities())).sum(-1).mean()))
    assert math.log(costs[0] / costs[1]) / math.log(errors[0] / errors[1]) == pytest.approx(ERROR_POWER, abs=0.3)


def test_two_short_fits_tell_level_and_slope() -> None:
    """Half way from the uniform share to the least and the largest that are offered."""
    config = CompressConfig(keep=0.6, steps=60)
    bank = Keep(0.6).shape_for((24, 24, 96))
    curve = measure_curve(normal(24, 24, 96).float(), bank, config)
    smaller = Keep(bank.share - 0.5 * (1 - bank.share) / 2).shape_for(bank.matrices)
    assert curve.share == smaller.share < bank.share
    assert 0 < curve.level < 1
    assert curve.slope > 0
    assert all(later < earlier for earlier, later in itertools.pairwise(map(curve, (0.4, 0.5, 0.6, 0.7, 0.8))))


def test_more_steps_gain_more_and_as_few_as_the_short_fits_nothing() -> None:
    bank = Keep(0.6).shape_for((12, 6, 16))
    gains = [
        measure_curve(normal(12, 6, 16).float(), bank, CompressConfig(keep=0.6, steps=steps)).gain
        for steps in (1, 20, 60, 500)
    ]
    assert gains[:2] == [0, 0]
    assert gains[3] > 2 * gains[2] > 0


def test_the_curve_of_zeros_is_zero() -> None:
    bank = Keep(0.5).shape_for((48, 48, 128))
    curve = measure_curve(torch.zeros(48, 48, 128), bank, CompressConfig(keep=0.5))
    assert (curve.level, curve.slope, curve(0.1), curve(0.9)) == (0.0, 0.0, 0.0, 0.0)


def test_the_least_bank_has_a_flat_curve() -> None:
    """There is no smaller one to measure its slope with, nor a larger within reach."""
    bank = BankShape(3, 48, 128, rank=1, num_bases=1)
    curve = measure_curve(normal(3, 48, 128).float(), bank, CompressConfig(keep=0.017, steps=2))
    assert curve.level > 0
    assert curve.slope == 0


def test_measured_constants_are_what_was_measured() -> None:
    """See docs/log.md: whoever measures anew changes both."""
    assert (ERROR_POWER, DAMPING, REACH, STEP) == (3.0, 0.8, 0.5, 0.005)
    assert (allocation.SHORT_STEPS, allocation.SHORT_ALIGNMENTS) == (20, 32)
    assert (allocation.GAIN, allocation.GAIN_STEPS) == (0.35, 25)
