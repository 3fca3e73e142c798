"""The cheapest choice of one option for each item within a budget, by a common price for what the options weigh."""

from __future__ import annotations

import math
from collections.abc import Sequence


def choose(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """For every item i the option j that together make Σ costs[i][j] small while Σ sizes[i][j] ≤ budget.

    Sizes ascend and costs descend along an item's options. All items are asked for the same saving per unit of size,
    the least that the budget allows: no other choice of that total is cheaper (Everett 1963). What is left of the
    budget goes to the most profitable enlargements that still fit. The first options must fit the budget.
    """

    def at(price: float) -> list[int]:
        return [
            min(range(len(cost)), key=lambda j, cost=cost, size=size: (cost[j] + price * size[j], size[j]))
            for cost, size in zip(costs, sizes, strict=True)
        ]

    def total(chosen: Sequence[int]) -> int:
        return sum(size[j] for size, j in zip(sizes, chosen, strict=True))

    smallest = [0] * len(costs)
    assert total(smallest) <= budget
    chosen = at(0.0)
    if total(chosen) > budget:
        low, high = -100.0, 100.0  # logarithms of a price that is too low and of one that is high enough
        chosen = smallest
        for _ in range(80):
            middle = (low + high) / 2
            candidate = at(math.exp(middle))
            if total(candidate) > budget:
                low = middle
            else:
                high, chosen = middle, candidate
    while upgrade := _best_upgrade(costs, sizes, chosen, budget - total(chosen)):
        chosen[upgrade[0]] = upgrade[1]
    return chosen


def _best_upgrade(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], chosen: Sequence[int], spare: int
) -> tuple[int, int] | None:
    """The larger option (i, j) that saves most per unit of size among those that fit into what is spare."""
    upgrades = [
        ((cost[now] - cost[j]) / (size[j] - size[now]), i, j)
        for i, (cost, size, now) in enumerate(zip(costs, sizes, chosen, strict=True))
        for j in range(now + 1, len(cost))
        if size[j] - size[now] <= spare and cost[j] < cost[now]
    ]
    return max(upgrades)[1:] if upgrades else None
