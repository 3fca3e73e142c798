from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from globe.experts.metric import CAP, INPUT_SHRINKAGE, POWER, ROW_SHRINKAGE, LayerStatistics, input_metric, row_scales
from tests.random_experts import normal, second_moment

E, P, D = 4, 6, 10
SIGMAS = {"gate": 0.5, "up": 1.0, "down": 2.0}


def statistics(counts: tuple[int, ...] = (30, 5, 400, 65)) -> LayerStatistics:
    tokens = torch.tensor(counts, dtype=torch.float64)
    rows = {
        family: tokens[:, None] * scale * normal(E, P, seed=seed).square()
        for seed, (family, scale) in enumerate((("gate", 2.0), ("up", 0.7), ("down", 3.0)))
    }
    return LayerStatistics(250, second_moment(D), tokens, rows)  # type: ignore[arg-type]


def test_the_input_metric_is_shrunk_at_equal_trace() -> None:
    found, given = input_metric(statistics()), second_moment(D)
    assert float(found.trace()) == pytest.approx(D)
    given = given * D / given.trace()
    torch.testing.assert_close(found - torch.eye(D).double(), (1 - INPUT_SHRINKAGE) * (given - torch.eye(D).double()))


def test_the_weight_of_a_matrix_is_a_power_of_its_share() -> None:
    """Mean square of the row scales, in proportion where no cap is reached, against the definition."""
    given = statistics((90, 110, 100, 80))
    found = row_scales(given, SIGMAS)
    size = float(given.inputs.trace()) / D
    importance = {
        family: [float(given.rows[family][e].mean()) * SIGMAS[family] ** 2 * (1 if family == "down" else size)
                 for e in range(E)]
        for family in SIGMAS
    }  # fmt: skip
    mean = sum(map(sum, importance.values())) / (3 * E)
    for family, scales in found.items():
        expected = [min(max((value / mean) ** POWER, 1 / CAP), CAP) for value in importance[family]]
        assert scales.square().mean(1).tolist() == pytest.approx(expected)


def test_rows_keep_their_order_but_are_shrunk() -> None:
    found = row_scales(statistics(), SIGMAS)["down"].square()
    profile = found / found.mean(1, keepdim=True)
    assert float(profile.min()) >= ROW_SHRINKAGE
    given = statistics().rows["down"]
    assert int(profile[2].argmax()) == int(given[2].argmax())  # an expert with many tokens has its own profile


def test_weights_are_capped() -> None:
    found = row_scales(statistics((1_000_000, 1, 1, 1)), SIGMAS)["up"]
    weights = found.square().mean(1)
    assert float(weights[0]) <= CAP * (1 + 1e-6)
    assert float(weights[1]) == pytest.approx(1 / CAP)


def test_experts_never_reached_have_the_mean_of_their_family() -> None:
    given = statistics((30, 0, 400, 70))
    assert given.unreached == [1]
    found = row_scales(given, SIGMAS)
    for family in ("gate", "up", "down"):
        assert found[family].isfinite().all()
        assert (found[family] > 0).all()
    reached = dataclasses.replace(given, rows={f: r.clone() for f, r in given.rows.items()})  # type: ignore[misc]
    for rows in reached.rows.values():
        rows[1] = rows[[0, 2, 3]].mean(0)
    weights = row_scales(given, SIGMAS)["up"].square().mean(1)
    expected = row_scales(dataclasses.replace(reached, counts=torch.tensor([30.0, 1, 400, 70]).double()), SIGMAS)
    assert float(weights[1]) == pytest.approx(float(expected["up"].square().mean(1)[1]))


def test_the_metric_predicts_the_error_of_the_output() -> None:
    """Small independent errors of gate, up and down of one expert, on Gaussian tokens: within a third."""
    D = 64
    gate, up, down = (normal(P, D, seed=seed) / D**0.5 for seed in range(3))
    x = normal(20_000, D, seed=3) @ torch.diag(torch.linspace(0.5, 1.5, D).double())
    second = x.mT @ x / len(x)
    sigmoid = torch.sigmoid(x @ gate.mT)
    slope = sigmoid * (1 + x @ gate.mT * (1 - sigmoid))

    def output(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (silu(x @ gate.mT) * (x @ up.mT)) @ down

    energy = down.square().sum(1)
    scales = {
        "gate": energy * (slope * (x @ up.mT)).square().mean(0),
        "up": energy * silu(x @ gate.mT).square().mean(0),
        "down": (silu(x @ gate.mT) * (x @ up.mT)).square().mean(0),
    }
    for seed, family in enumerate(scales):
        error = 1e-3 * normal(P, D, seed=10 + seed)
        moved = [matrix + error * (name == family) for name, matrix in zip(scales, (gate, up, down), strict=True)]
        measured = (output(*moved) - output(gate, up, down)).square().sum(1).mean()
        weighed = error if family == "down" else error @ second
        predicted = (scales[family] * (weighed * error).sum(1)).sum()
        assert float(predicted / measured) == pytest.approx(1, abs=1 / 3)


def test_tokens_of_zeros_tell_nothing() -> None:
    given = dataclasses.replace(statistics(), inputs=torch.zeros(D, D).double())
    assert torch.equal(input_metric(given), torch.eye(D).double())
    assert all(bool(scales.isfinite().all()) for scales in row_scales(given, SIGMAS).values())


def test_in_a_layer_that_no_token_reaches_all_rows_matter_the_same() -> None:
    nothing = {family: torch.zeros(E, P).double() for family in SIGMAS}
    given = dataclasses.replace(statistics((0, 0, 0, 0)), rows=nothing)
    assert all(torch.equal(scales, torch.ones(E, P).double()) for scales in row_scales(given, SIGMAS).values())


def test_where_down_is_zero_gate_and_up_matter_the_same() -> None:
    given = statistics()
    rows = {**given.rows, "gate": torch.zeros(E, P).double(), "up": torch.zeros(E, P).double()}
    found = row_scales(dataclasses.replace(given, rows=rows), {**SIGMAS, "down": 0.0})
    assert torch.equal(found["gate"], torch.ones(E, P).double())
    assert torch.equal(found["up"], found["gate"])
    assert bool((found["down"] > 0).all())


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_the_units_of_the_weights_do_not_matter(unit: float) -> None:
    given = statistics()
    given = dataclasses.replace(given, rows={family: rows.float() for family, rows in given.rows.items()})
    expected, found = row_scales(given, SIGMAS), row_scales(given, {family: unit * x for family, x in SIGMAS.items()})
    for family in SIGMAS:
        torch.testing.assert_close(found[family], expected[family])


def test_the_scales_are_the_formula_row_by_row() -> None:
    """With the constants that were measured (docs/log.md), expert by expert and row by row."""
    given = statistics((90, 0, 4000, 80))
    found, size = row_scales(given, SIGMAS), float(given.inputs.trace()) / D
    importance: dict[str, list[float]] = {}
    for family, sigma in SIGMAS.items():
        unit = 1.0 if family == "down" else size
        own = [sum(given.rows[family][e].tolist()) / P * sigma**2 * unit for e in range(E)]
        own[1] = (own[0] + own[2] + own[3]) / 3
        importance[family] = own
    mean = sum(map(sum, importance.values())) / (3 * E)
    for family, scales in found.items():
        sums = given.rows[family]
        for e in range(E):
            weight = min(max((importance[family][e] / mean) ** 0.35, 1 / 3), 3.0)
            profile = [float(sums[e, p]) + sum(float(sums[k, p]) for k in range(E)) / E for p in range(P)]
            level = sum(profile) / P
            expected = [(weight * (0.4 * each / level + 0.6)) ** 0.5 for each in profile]
            assert scales[e].tolist() == pytest.approx(expected, rel=1e-9)


def test_the_input_metric_is_four_fifths_identity() -> None:
    given = second_moment(D)
    expected = 0.2 * given / given.diagonal().mean() + 0.8 * torch.eye(D).double()
    torch.testing.assert_close(input_metric(statistics()), expected)
