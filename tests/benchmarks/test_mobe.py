"""MoBE: shapes within the budget, the gradient that autograd finds, and Adam as torch has it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.rivals.mobe import (
    LEARNING_RATE,
    OVERSPEND,
    Activation,
    Loss,
    Parameters,
    best_shape,
    mobe,
    published_shape,
    rebuild,
    train,
    warm_start,
)
from globe.errors import SettingsError
from globe.terms import FAMILIES
from tests.random_experts import normal


def fresh(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Parameters]:
    """Experts (2, 5, 4, 6) and a start that is none of the warm start's corners."""
    shapes = (2, 5, 4, 3), (2, 5, 2), (2, 2, 3, 6)
    parameters = Parameters(*(normal(*shape, seed=seed + 1 + place, dtype=dtype) for place, shape in enumerate(shapes)))
    return normal(2, 5, 4, 6, seed=seed, dtype=dtype), parameters


def reference_losses(experts: torch.Tensor, now: Parameters, activation: Activation = "silu") -> torch.Tensor:
    rebuilt = rebuild(now.adapters, now.logits.softmax(-1), now.bases, activation)
    return (rebuilt - experts).square().mean((1, 2, 3))


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75, 0.9])
def test_shapes_spend_the_budget(keep: float) -> None:
    num_experts, rows, columns = 16, 48, 128
    for shape in (published_shape(num_experts, rows, columns, keep), best_shape(num_experts, rows, columns, keep)):
        if shape is None:
            assert keep < rows / columns
            continue
        rank, num_bases = shape
        stored = num_experts * rows * rank + num_bases * rank * columns + num_experts * num_bases
        one_more = rank * columns + num_experts
        assert stored <= OVERSPEND * keep * num_experts * rows * columns < stored + one_more


def test_budget_out_of_reach() -> None:
    with pytest.raises(SettingsError, match="no basis"):
        best_shape(16, 48, 128, 0.001)


def test_stored_parameters() -> None:
    stacks = {(layer, family): normal(5, 4, 6, seed=layer).float() for layer in (0, 3) for family in FAMILIES}
    found = mobe(stacks, (3, 2), 1, torch.float32)
    assert found.stored_parameters == 2 * 3 * (5 * 4 * 3 + 2 * 3 * 6 + 5 * 2)
    assert set(found.stacks) == set(stacks)


def test_warm_start_of_one_group_per_expert_is_exact_up_to_the_activation() -> None:
    experts = normal(2, 3, 4, 6)
    start = warm_start(experts, 4, 3)
    torch.testing.assert_close(start.adapters @ start.bases, experts)
    assert torch.equal(start.logits, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


def test_warm_start_groups_need_not_divide_the_experts() -> None:
    start = warm_start(normal(1, 5, 4, 6), 3, 2)
    assert start.logits.sum(2).eq(1).all()
    assert start.logits.sum(1).tolist() == [[2, 3]]


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_gradient_is_autograds(activation: Activation) -> None:
    experts, now = fresh()
    gradient = Parameters(*(torch.full_like(tensor, torch.nan) for tensor in now.tensors))
    losses = Loss(experts, activation)(now, gradient)
    leaves = Parameters(*(tensor.clone().requires_grad_() for tensor in now.tensors))
    expected = reference_losses(experts, leaves, activation)
    torch.testing.assert_close(losses, expected.detach())
    for found, wanted in zip(gradient.tensors, torch.autograd.grad(expected.sum(), leaves.tensors), strict=True):
        torch.testing.assert_close(found, wanted)


def test_steps_are_adams_on_every_bank_alone() -> None:
    experts, start = fresh()
    alone = [Parameters(*(t[bank : bank + 1].clone() for t in start.tensors)) for bank in range(2)]
    train(experts, start, 5)
    for bank, parameters in enumerate(alone):
        leaves = Parameters(*(tensor.requires_grad_() for tensor in parameters.tensors))
        optimiser = torch.optim.Adam(leaves.tensors, lr=LEARNING_RATE)
        for _ in range(5):
            optimiser.zero_grad()
            reference_losses(experts[bank : bank + 1], leaves).sum().backward()
            optimiser.step()
        for moved, wanted in zip(start.tensors, leaves.tensors, strict=True):
            torch.testing.assert_close(moved[bank], wanted.detach()[0])


def test_loss_falls_and_the_best_iterate_is_returned() -> None:
    experts = normal(1, 6, 4, 8, dtype=torch.float32)
    seen: list[float] = []
    best = train(experts, warm_start(experts, 4, 3), 100, lambda _, losses: seen.append(float(losses)))
    assert len(seen) == 101
    assert min(seen[-20:]) < 0.5 * seen[0]
    assert float(reference_losses(experts, best)) == pytest.approx(min(seen[::20]))
