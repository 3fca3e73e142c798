from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from globe.plan.knapsack import choose

Item = list[tuple[int, float]]


@st.composite
def items(draw: st.DrawFn) -> Item:
    """Options of one item: ascending sizes, descending costs."""
    sizes = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=5)))
    costs = sorted(draw(st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes))), reverse=True)
    return list(zip(sizes, costs, strict=True))


def run(problem: list[Item], budget: int) -> tuple[float, int]:
    chosen = choose([[c for _, c in item] for item in problem], [[s for s, _ in item] for item in problem], budget)
    picked = [item[j] for item, j in zip(problem, chosen, strict=True)]
    return sum(cost for _, cost in picked), sum(size for size, _ in picked)


def cheapest(problem: list[Item], budget: int) -> float:
    """By trying every choice."""
    choices = itertools.product(*problem)
    return min(sum(c for _, c in choice) for choice in choices if sum(s for s, _ in choice) <= budget)


def convex(weight: float, num_options: int) -> Item:
    return [(size, weight * 0.5**size) for size in range(1, num_options + 1)]


def test_items_of_equal_steps_are_served_as_well_as_trying_every_choice_does() -> None:
    problem = [convex(weight, 8) for weight in (1.0, 3.0, 17.0, 0.2)]
    for budget in range(4, 33):
        cost, size = run(problem, budget)
        assert size == budget
        assert abs(cost - cheapest(problem, budget)) < 1e-12


@given(st.lists(items(), min_size=1, max_size=4), st.integers(0, 80))
def test_the_budget_is_kept_and_no_smaller_one_is_served_better(problem: list[Item], spare: int) -> None:
    budget = sum(item[0][0] for item in problem) + spare
    cost, size = run(problem, budget)
    assert size <= budget
    largest_step = max(item[-1][0] - item[0][0] for item in problem)
    if spare >= largest_step:
        assert cost <= cheapest(problem, budget - largest_step) + 1e-9


def sized(*options: tuple[int, float]) -> Item:
    return list(options)


BLOCKING = sized((1, 1e6), (99, 0.0))
"""Worth most per unit and too large: at any price that serves the others it is bought."""


@pytest.mark.parametrize(
    ("others", "spare", "cost"),
    [
        ([sized((1, 4.0), (4, 1.0))], 2, 4.0),  # a unit short
        ([sized((1, 4.0), (4, 1.0))], 3, 1.0),  # all that is spare
        ([sized((1, 5.0), (5, 3.0)), sized((1, 4.0), (3, 2.5)), sized((1, 4.0), (3, 2.5))], 4, 10.0),  # per unit
        ([sized((1, 5.0), (2, 5.0), (4, 1.0))], 3, 1.0),  # past an option that gains nothing
        ([sized((1, 5.0), (2, 4.0), (3, 1.0))], 2, 1.0),  # past one that gains little
    ],
)
def test_what_is_left_goes_to_the_most_profitable_enlargements(others: list[Item], spare: int, cost: float) -> None:
    found, size = run([BLOCKING, *others], 1 + len(others) + spare)
    assert found == 1e6 + cost
    assert size <= 1 + len(others) + spare


def test_of_options_of_one_cost_the_smallest_is_taken() -> None:
    assert run([sized((1, 2.0), (3, 2.0), (9, 2.0)), sized((2, 0.0), (5, 0.0))], 100) == (2.0, 3)
