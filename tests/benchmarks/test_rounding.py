"""Rounding against a loop over groups, and error feedback against the least squares that it solves step by step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.calibration import damped
from benchmarks.rivals.gptq import DAMPING, best_grid, gptq, round_with_feedback
from benchmarks.rivals.rounding import GROUP, bits_of_a_weight, in_groups, round_to, rounding
from globe.errors import SettingsError
from tests.benchmarks.calibrated import invented
from tests.random_experts import normal

F32 = torch.float32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_the_nearest_point_of_the_grid(bits: int) -> None:
    experts = normal(2, 3, 2 * GROUP, dtype=F32)
    found = rounding({(0, "gate"): experts}, bits)
    assert bits_of_a_weight(bits) == bits + 1
    for weights, rounded in zip(experts.view(-1, GROUP), found.stacks[0, "gate"].reshape(-1, GROUP), strict=True):
        low = weights.min().half().double()
        step = ((weights.max() - weights.min()) / (2**bits - 1)).half().double()
        points = low + step * torch.arange(2**bits)
        nearest = points[(weights[:, None] - points).abs().argmin(1)]
        torch.testing.assert_close(rounded.double(), nearest, rtol=1e-5, atol=1e-6)
        assert len(rounded.unique()) <= 2**bits


def test_best_grid_is_no_worse_than_the_full_range() -> None:
    groups = normal(50, GROUP, dtype=F32)
    narrow = round_to(groups, *best_grid(groups, 2), 2)
    full = rounding({(0, "gate"): groups.flatten()[None, None]}, 2).stacks[0, "gate"].view(-1, GROUP)
    assert bool(((narrow - groups).square().sum(1) <= (full - groups).square().sum(1) + 1e-6).all())


def test_feedback_solves_for_the_inputs_to_come() -> None:
    """After each input the ones to come are those that make up best for the error so far; groups across outputs."""
    weights, moment = normal(1, 6, GROUP, dtype=F32), invented(2, 6, 6).layers[0].inputs[None]
    found = round_with_feedback(weights, moment, 2, across_outputs=True)[0].double()
    C, W = damped(moment, DAMPING)[0].double(), weights[0].double()
    for place in range(6):
        error, come = found[:place] - W[:place], slice(place, None)
        now = W[come] - torch.linalg.solve(C[come, come], C[come, :place] @ error)
        expected = in_groups(now[0].float())
        expected = round_to(expected, *best_grid(expected, 2), 2).flatten()
        torch.testing.assert_close(found[place].float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["up", "down"])
def test_feedback_lowers_the_calibrated_error(family: str) -> None:
    stacks, calibration = {(0, family): normal(3, 24, 2 * GROUP, dtype=F32)}, invented(3, 24, 2 * GROUP)

    def calibrated_error(approximation: torch.Tensor) -> float:
        error = approximation - stacks[0, family]
        error = error if family == "down" else error.mT
        return float(torch.einsum("enk,enm,emk->", error, calibration.moment(0, family).expand(3, -1, -1), error))

    for bits in (3, 4):
        with_feedback = calibrated_error(gptq(stacks, bits, calibration).stacks[0, family])
        assert with_feedback < 0.9 * calibrated_error(rounding(stacks, bits).stacks[0, family])


def test_ragged_groups_are_refused() -> None:
    with pytest.raises(SettingsError, match="whole number of groups"):
        rounding({(0, "gate"): normal(1, 2, 40, dtype=F32)}, 4)
    with pytest.raises(SettingsError, match="whole number of groups"):
        gptq({(0, "gate"): normal(1, 2, 40, dtype=F32)}, 4, invented(1, 2, 40))
