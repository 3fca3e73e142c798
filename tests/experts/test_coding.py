"""A family of a layer as a problem of coding, against loops in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.experts import coding
from globe.experts.coding import LONG_ROW, POWER, SHARE_OF_MEAN, SHRINKAGE, coding_problem, damped, form_of
from globe.experts.metric import LayerStatistics
from globe.measure.calibrate import calibrate
from globe.model import find_experts
from globe.model.loading import expert_layers
from globe.quant.side import SharedCosts
from globe.quant.trellis import LOG_STATES
from globe.quant.water_fill import UNIT, widths_at
from globe.terms import FAMILIES, Family
from tests.coded import D, E, P, write_source
from tests.model.compressed import token_ids
from tests.random_experts import normal, second_moment

INDEX = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("coding") / "source"
    write_source(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def layer(checkpoint: Checkpoint) -> ExpertLayer:
    return next(layer for layer in expert_layers(checkpoint) if layer.index == INDEX)


def statistics(**changes: Any) -> LayerStatistics:
    moments = torch.stack([second_moment(P, seed=expert) for expert in range(E)])
    settings: dict[str, Any] = {
        "num_tokens": 50,
        "inputs": second_moment(D).float(),
        "counts": torch.full((E,), 10.0),
        "rows": {family: torch.ones(E, P) for family in FAMILIES},
        "inner": moments.float(),
    }
    return LayerStatistics(**settings | changes)


def stored(checkpoint: Checkpoint, expert: int, family: str) -> Tensor:
    """Inputs x outputs of an expert, float64: its weight transposed."""
    return checkpoint.read(f"model.layers.{INDEX}.mlp.experts.{expert}.{family}_proj.weight").double().T


def moment(found: LayerStatistics | None, family: str, expert: int) -> Tensor:
    """C of an expert's inputs as the module's docstring has it, entry by entry, float64."""
    size = P if family == "down" else D
    if found is None:
        return torch.eye(size, dtype=torch.float64)
    raw = (found.inputs if family != "down" else found.inner[expert]).double()  # pyright: ignore[reportOptionalSubscript]
    mean = sum(float(raw[i, i]) for i in range(size)) / size
    C = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            C[i, j] = raw[i, j] / mean + (SHRINKAGE if i == j else 0)
    return C


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_costs_what_theory_says(
    checkpoint: Checkpoint, layer: ExpertLayer, family: Family, known: bool
) -> None:
    """Importance times tr(ΔᵀCΔ) is s_e times the share of the energy, for any Δ: against the definition."""
    found = statistics() if known else None
    sensitivities = torch.linspace(0.5, 2, E)
    problem = coding_problem(checkpoint, layer, family, found, sensitivities)
    K = D if family == "down" else P
    assert problem.X.shape == (E, (D, P)[family == "down"], K)
    assert problem.X.dtype == torch.float32
    assert problem.form == ("own" if family == "down" else "shared")
    for expert in range(E):
        X, C = stored(checkpoint, expert, family), moment(found, family, expert)
        assert torch.equal(problem.X[expert], X.float())
        energy = sum(float(X[:, k] @ C @ X[:, k]) for k in range(K))
        assert float(problem.importance[expert]) == pytest.approx(float(sensitivities[expert]) / energy, rel=1e-5)
        order = problem.order
        row = expert if len(order.inputs) > 1 else 0
        check_order(order.inputs[row], order.shares[row], order.prices[row], C)


def check_order(inputs: Tensor, shares: Tensor, prices: Tensor, C: Tensor) -> None:
    """Shares and prices take C apart: C = S⁻¹ diag(d) S⁻ᵀ with S unit upper triangular, by growing variance."""
    sorted_ = C[inputs][:, inputs]
    variances = sorted_.diagonal()
    assert bool((variances[1:] >= variances[:-1] * (1 - 1e-6)).all())
    S = shares.double()
    torch.testing.assert_close(S @ sorted_ @ S.T, torch.diag(prices.double()), rtol=1e-4, atol=1e-4)


def test_gate_and_up_share_their_order_and_down_has_one_for_each_expert(
    checkpoint: Checkpoint, layer: ExpertLayer
) -> None:
    problems = {family: coding_problem(checkpoint, layer, family, statistics(), torch.ones(E)) for family in FAMILIES}
    assert [len(problems[family].order.inputs) for family in FAMILIES] == [1, 1, E]
    assert torch.equal(problems["gate"].order.inputs, problems["up"].order.inputs)


def test_nothing_is_known_of_experts_without_tokens_and_of_tokens_of_zeros(
    checkpoint: Checkpoint, layer: ExpertLayer
) -> None:
    inner = statistics().inner
    assert inner is not None
    inner[3] = 0
    problem = coding_problem(checkpoint, layer, "down", statistics(inner=inner), torch.ones(E))
    torch.testing.assert_close(problem.order.prices[3], torch.full((P,), 1 + SHRINKAGE))
    assert not torch.allclose(problem.order.prices[2], torch.full((P,), 1 + SHRINKAGE))
    problem = coding_problem(checkpoint, layer, "up", statistics(inputs=torch.zeros(D, D)), torch.ones(E))
    torch.testing.assert_close(problem.order.prices[0], torch.full((D,), 1 + SHRINKAGE))


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_the_units_of_the_inputs_do_not_matter(checkpoint: Checkpoint, layer: ExpertLayer, unit: float) -> None:
    given = statistics()
    assert given.inner is not None
    scaled = statistics(inputs=unit * given.inputs, inner=unit * given.inner)
    for family in FAMILIES:
        one, two = (coding_problem(checkpoint, layer, family, each, torch.ones(E)) for each in (given, scaled))
        assert torch.equal(one.order.inputs, two.order.inputs)
        torch.testing.assert_close(one.order.prices, two.order.prices)
        torch.testing.assert_close(one.importance, two.importance)


def test_experts_of_zeros_cost_nothing(
    checkpoint: Checkpoint, layer: ExpertLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*given: Any) -> Tensor:
        weights = real(*given)
        weights[2] = 0
        return weights

    real = coding.read_family
    monkeypatch.setattr(coding, "read_family", read)
    problem = coding_problem(checkpoint, layer, "down", None, torch.ones(E))
    assert problem.importance[2] == 0
    assert bool((problem.importance[[0, 1, 3]] > 0).all())
    costs = problem.rows().costs
    assert not bool(widths_at(costs[2], int(costs[3].min()) - 100).any())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_cost_their_mean_square_times_price_and_importance(
    checkpoint: Checkpoint, layer: ExpertLayer, family: Family
) -> None:
    problem = coding_problem(checkpoint, layer, family, statistics(), torch.linspace(0.5, 2, E))
    squares = problem.X.double().square().mean(2)
    expected = torch.zeros_like(squares)
    for expert in range(E):
        row = expert if family == "down" else 0
        for place, index in enumerate(problem.order.inputs[row].tolist()):
            cost = problem.importance[expert] * problem.order.prices[row, place] * squares[expert, index]
            expected[expert, index] = UNIT * math.log2(float(cost))
    found = problem.costs(problem.X.square().mean(2))
    if problem.form == "own":
        assert isinstance(found, Tensor)
        assert (found - expected).abs().max() <= 1
    else:
        assert isinstance(found, SharedCosts)
        means = expected - expected.mean(1, keepdim=True) - expected.mean(0) + expected.mean()
        assert ((found.total() - expected) + means).abs().max() <= 2  # least squares: rows' and columns' means agree
    rows = problem.rows()
    assert rows.length == problem.X.shape[2]
    assert torch.equal(rows.costs, found.total() if isinstance(found, SharedCosts) else found)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_planned_is_what_is_stored_and_what_is_returned_is_what_is_decoded(
    checkpoint: Checkpoint, layer: ExpertLayer, family: Family
) -> None:
    problem = coding_problem(checkpoint, layer, family, statistics(), torch.ones(E))
    multiplier = int(problem.rows().costs.median()) - 3 * 2 * UNIT  # about three bits
    rehearsed = problem.rehearsed(multiplier)
    coded, decoded = rehearsed.code(multiplier)
    assert coded.payload.numel() == rehearsed.rows().num_bytes(multiplier)
    assert torch.equal(coded.decode(), decoded)
    missed = (decoded - problem.X).norm() / problem.X.norm()
    assert 0.01 < float(missed) < 0.4


def test_short_rows_are_planned_at_the_length_that_closes() -> None:
    costs = torch.zeros(2, 3, dtype=torch.int32)
    assert coding._rows(costs, 5).length == LOG_STATES
    assert coding._rows(costs, 40).length == 40
    shared = SharedCosts(torch.tensor([1, 2]), torch.tensor([10, 20, 30]))
    assert coding._rows(shared, 40).costs.tolist() == [[11, 21, 31], [12, 22, 32]]


@pytest.mark.parametrize(
    ("family", "num_outputs", "form"),
    [
        ("gate", LONG_ROW - 1, "shared"),
        ("up", LONG_ROW, "own"),
        ("gate", 48, "shared"),
        ("down", 48, "own"),
        ("down", 4096, "own"),
    ],
)
def test_short_rows_of_equal_inputs_share_widths_and_scales(family: Family, num_outputs: int, form: str) -> None:
    assert form_of(family, num_outputs) == form


def test_damped_sensitivities_against_the_definition() -> None:
    given: dict[tuple[int, Family], Tensor] = {
        (0, "gate"): normal(E, seed=1).exp().float(),
        (0, "down"): 10 * normal(E, seed=2).exp().float(),
        (3, "gate"): torch.zeros(E),
    }
    every = [float(x) for each in given.values() for x in each]
    mean = sum(every) / len(every)
    found = damped(given)
    assert found.keys() == given.keys()
    for key, each in given.items():
        assert found[key].tolist() == pytest.approx([(float(s) / mean + SHARE_OF_MEAN) ** POWER for s in each])
    doubled = damped({key: 2 * each for key, each in given.items()})
    for key in given:
        torch.testing.assert_close(doubled[key], found[key])


def test_where_nothing_is_sensitive_all_matters_the_same() -> None:
    found = damped({(0, "up"): torch.zeros(3), (1, "up"): torch.zeros(2)})
    assert [each.tolist() for each in found.values()] == [[1, 1, 1], [1, 1]]


@torch.no_grad()
def test_statistics_of_the_model_itself_predict_the_error_of_its_down_matrices(tmp_path: Path) -> None:
    """tr(ΔᵀCΔ) with C before it is shrunk is the squared change of what the experts add, summed over the tokens."""
    model = write_source(tmp_path / "source")
    ids = token_ids(batch=3, length=20)
    found = calibrate(model, ids, [INDEX], inner=True)[INDEX]
    (experts,) = (each for each in find_experts(model) if each.layer == INDEX)
    caught: list[tuple[Tensor, ...]] = []
    hook = experts.module.register_forward_pre_hook(lambda _, arguments: caught.append(arguments))
    model(input_ids=ids)
    hook.remove()
    (arguments,) = caught
    change = 1e-2 * normal(D, P, seed=4).float()
    for expert in range(E):
        before = experts.module(*arguments)
        experts.module.down_proj[expert] += change
        moved = (experts.module(*arguments) - before).double().square().sum()
        experts.module.down_proj[expert] -= change
        assert found.inner is not None
        predicted = (change.double() @ found.inner[expert].double() * change).sum()
        assert float(predicted) == pytest.approx(float(moved), rel=1e-2, abs=1e-9)
