"""A family of a layer as a problem of coding, against loops in float64."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from globe.checkpoint.layout import ExpertLayer
from globe.checkpoint.reader import Checkpoint, open_checkpoint
from globe.experts import coding
from globe.experts.coding import POWER, SHARE_OF_MEAN, SHRINKAGE, CodingProblem, damped
from globe.experts.family import ExpertFamily
from globe.experts.metric import LayerStatistics
from globe.measure.calibrate import calibrate
from globe.model.configuration import expert_layers
from globe.model.expert_modules import find_experts
from globe.quant.feedback import order_inputs
from globe.quant.outputs import Outputs
from globe.quant.side import SharedCosts
from globe.quant.sizes import side_bytes
from globe.quant.trellis import LOG_STATES
from globe.quant.water_fill import LEAST_MULTIPLIER, UNIT, widths_at
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


def coding_problem(*given: Any) -> CodingProblem:
    """Of all experts."""
    whole = ExpertFamily(*given)
    (part,) = whole.parts
    return whole.problem(part)


def stored(checkpoint: Checkpoint, expert: int, family: str) -> Tensor:
    """Inputs x outputs of an expert, float64: its weight transposed."""
    return checkpoint.read(f"model.layers.{INDEX}.mlp.experts.{expert}.{family}_proj.weight").double().T


def sensitivities(family: Family) -> Tensor:
    """(E, K), float32."""
    return normal(E, D if family == "down" else P, seed=9).exp().float()


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
    """Noise as large as the family's weights costs an output what it is sensitive: of Σ_k importance_k Δ_kᵀ C Δ_k the
    mean over the noise, which is tr C times its variance. Before C is shrunk, tr C is N."""
    found = statistics() if known else None
    given = sensitivities(family)
    problem = coding_problem(checkpoint, layer, family, found, given)
    K = D if family == "down" else P
    assert problem.X.shape == (E, (D, P)[family == "down"], K)
    assert problem.X.dtype == torch.float32
    assert problem.form == ("own" if family == "down" else "shared")
    assert (problem.outputs.exponents is not None) == (family == "up")
    entries = [float(x) for expert in range(E) for x in stored(checkpoint, expert, family).flatten()]
    variance = sum(x * x for x in entries) / len(entries)
    for expert in range(E):
        X, C = stored(checkpoint, expert, family), moment(found, family, expert)
        assert torch.equal(problem.X[expert], X.float())
        for k in range(K):
            cost = float(problem.importance[expert, k]) * variance * len(C)
            assert cost == pytest.approx(float(given[expert, k]), rel=1e-5)
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
    problems = {
        family: coding_problem(checkpoint, layer, family, statistics(), sensitivities(family)) for family in FAMILIES
    }
    assert [len(problems[family].order.inputs) for family in FAMILIES] == [1, 1, E]
    assert torch.equal(problems["gate"].order.inputs, problems["up"].order.inputs)


def test_nothing_is_known_of_experts_without_tokens_and_of_tokens_of_zeros(
    checkpoint: Checkpoint, layer: ExpertLayer
) -> None:
    inner = statistics().inner
    assert inner is not None
    inner[3] = 0
    problem = coding_problem(checkpoint, layer, "down", statistics(inner=inner), torch.ones(E, D))
    torch.testing.assert_close(problem.order.prices[3], torch.full((P,), 1 + SHRINKAGE))
    assert not torch.allclose(problem.order.prices[2], torch.full((P,), 1 + SHRINKAGE))
    problem = coding_problem(checkpoint, layer, "up", statistics(inputs=torch.zeros(D, D)), torch.ones(E, P))
    torch.testing.assert_close(problem.order.prices[0], torch.full((D,), 1 + SHRINKAGE))


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_the_units_of_the_inputs_do_not_matter(checkpoint: Checkpoint, layer: ExpertLayer, unit: float) -> None:
    given = statistics()
    assert given.inner is not None
    scaled = statistics(inputs=unit * given.inputs, inner=unit * given.inner)
    for family in FAMILIES:
        one, two = (coding_problem(checkpoint, layer, family, each, sensitivities(family)) for each in (given, scaled))
        assert torch.equal(one.order.inputs, two.order.inputs)
        torch.testing.assert_close(one.order.prices, two.order.prices)
        torch.testing.assert_close(one.importance, two.importance)


def test_experts_of_zeros_cost_nothing(
    checkpoint: Checkpoint, layer: ExpertLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*given: Any) -> Tensor:
        weights = real(*given)
        weights[zeros] = 0
        return weights

    real = coding.read_family
    monkeypatch.setattr(coding, "read_family", read)
    zeros: Any = 2
    costs = coding_problem(checkpoint, layer, "down", None, torch.ones(E, D)).rows().costs
    assert not bool(widths_at(costs[2], int(costs[3].min()) - 100).any())
    zeros = slice(None)
    problem = coding_problem(checkpoint, layer, "down", None, torch.ones(E, D))
    assert not bool(problem.importance.any())
    assert not bool(widths_at(problem.rows().costs, LEAST_MULTIPLIER).any())


def scales(problem: CodingProblem) -> Tensor:
    """d (E, K), float64."""
    steps = problem.outputs.exponents
    return torch.ones(problem.importance.shape, dtype=torch.float64) if steps is None else 2.0 ** (steps.double() / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_coded_rows_cost_what_they_cost_when_they_are_undone(
    checkpoint: Checkpoint, layer: ExpertLayer, family: Family
) -> None:
    """Σ_k importance_k Δ_kᵀ C Δ_k of errors that are spread evenly over the outputs of rows as they are coded: the mean
    over the errors of one output each."""
    problem = coding_problem(checkpoint, layer, family, statistics(), sensitivities(family))
    _, N, K = problem.X.shape
    inputs = normal(N, seed=3)
    costs = torch.zeros(E, dtype=torch.float64)
    C = torch.stack([moment(statistics(), family, expert) for expert in range(E)])
    for k in range(K):
        error = torch.zeros(E, N, K)
        error[:, :, k] = inputs.float()
        undone = problem.outputs.undo(error).double()
        costs += (torch.einsum("enk,enm,emk->ek", undone, C, undone) * problem.importance).sum(1)
    expected = problem.row_importance * K * torch.einsum("n,enm,m->e", inputs, C, inputs)
    torch.testing.assert_close(costs, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_cost_their_mean_square_times_price_and_importance(
    checkpoint: Checkpoint, layer: ExpertLayer, family: Family
) -> None:
    problem = coding_problem(checkpoint, layer, family, statistics(), sensitivities(family))
    d = scales(problem)
    squares = (problem.X * d[:, None]).square().mean(2)  # the rotation leaves them as they are
    importance = (problem.importance / d.square()).mean(1)
    expected = torch.zeros_like(squares)
    for expert in range(E):
        row = expert if family == "down" else 0
        for place, index in enumerate(problem.order.inputs[row].tolist()):
            cost = importance[expert] * problem.order.prices[row, place] * squares[expert, index]
            expected[expert, index] = UNIT * math.log2(float(cost))
    found = problem.costs(squares.float())
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
    problem = coding_problem(checkpoint, layer, family, statistics(), sensitivities(family))
    multiplier = int(problem.rows().costs.median()) - 3 * 2 * UNIT  # about three bits
    rehearsed = problem.rehearsed(multiplier)
    coded, decoded = rehearsed.code(multiplier)
    assert coded.payload.numel() == rehearsed.rows().num_bytes(multiplier)
    assert coded.num_bytes == coded.payload.numel() + problem.side_bytes
    assert torch.equal(coded.decode(), decoded)
    missed = (decoded - problem.X).norm() / problem.X.norm()
    assert 0.01 < float(missed) < 0.4


def test_short_rows_are_planned_at_the_length_that_closes() -> None:
    costs = torch.zeros(2, 3, dtype=torch.int32)
    assert coding._rows(costs, 5).length == LOG_STATES
    assert coding._rows(costs, 40).length == 40
    assert coding._rows(costs, 41).length == 42
    shared = SharedCosts(torch.tensor([1, 2]), torch.tensor([10, 20, 30]))
    assert coding._rows(shared, 40).costs.tolist() == [[11, 21, 31], [12, 22, 32]]


def stack(num_experts: int, num_inputs: int, num_outputs: int, spread: float) -> CodingProblem:
    """Rows whose sizes are products, times what each has of its own, of a factor of 2^spread."""
    sizes = normal(num_experts, 1, 1, seed=1) + normal(num_inputs, 1, seed=2)
    sizes = sizes + spread * normal(num_experts, num_inputs, 1, seed=3)
    X = normal(num_experts, num_inputs, num_outputs) * sizes.exp2()
    C = second_moment(num_inputs).float()
    importance = torch.ones(num_experts, num_outputs)
    return CodingProblem(X.float(), order_inputs(C[None]), importance, C, 1.0, Outputs())


@pytest.mark.parametrize(
    ("sizes", "spread", "form"),
    [
        ((8, 64, 256), 0.0, "own"),  # long rows: a few that are cut off would lose more than sharing saves
        ((8, 64, 48), 0.0, "shared"),
        ((8, 64, 48), 0.03, "shared"),
        ((8, 64, 32), 0.1, "shared"),
        ((8, 64, 32), 1.0, "own"),
        ((2, 64, 48), 0.0, "own"),  # what two experts share takes more than they have
    ],
)
def test_rows_that_are_no_products_have_widths_and_scales_of_their_own(
    sizes: tuple[int, int, int], spread: float, form: str
) -> None:
    problem = stack(*sizes, spread)
    assert problem.form == form
    assert problem.side_bytes == side_bytes(*sizes[:2], form == "shared")
    assert isinstance(problem.costs(problem.X.square().mean(2)), SharedCosts) == (form == "shared")


def test_damped_sensitivities_against_the_definition() -> None:
    given: dict[tuple[int, Family], Tensor] = {
        (0, "gate"): normal(E, P, seed=1).exp().float(),
        (0, "down"): 10 * normal(E, D, seed=2).exp().float(),
        (3, "gate"): torch.zeros(E, P),
    }
    given[0, "gate"][2] = 0
    every = [sum(outputs) for each in given.values() for outputs in each.tolist()]
    mean = sum(every) / len(every)
    found = damped(given)
    assert found.keys() == given.keys()
    for key, each in given.items():
        assert found[key].shape == each.shape
        for outputs, importance in zip(each.tolist(), found[key].tolist(), strict=True):
            own, own_mean = (sum(outputs) / mean + SHARE_OF_MEAN) ** POWER, sum(outputs) / len(outputs)
            assert sum(importance) == pytest.approx(own, rel=1e-5)
            shares = [x + SHARE_OF_MEAN * own_mean if own_mean > 0 else 1.0 for x in outputs]
            assert importance == pytest.approx([own * share / sum(shares) for share in shares], rel=1e-5)
    doubled = damped({key: 2 * each for key, each in given.items()})
    for key in given:
        torch.testing.assert_close(doubled[key], found[key])


def test_where_nothing_is_sensitive_all_matters_the_same() -> None:
    found = damped({(0, "up"): torch.zeros(3, 2), (1, "up"): torch.zeros(2, 4)})
    assert [each.tolist() for each in found.values()] == [[[1, 1]] * 3, [[1, 1, 1, 1]] * 2]


@torch.no_grad()
def test_statistics_of_the_model_itself_predict_the_error_of_its_down_matrices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tr(ΔᵀCΔ) with C before it is shrunk is the squared change of what the experts add, summed over the tokens."""
    monkeypatch.setattr("globe.measure.calibrate.MOST_ENERGY", math.inf)
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


@pytest.mark.parametrize(("form", "num_outputs"), [("own", 256), ("shared", 48)])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_loss_that_is_predicted_is_that_of_what_is_stored(form: str, num_outputs: int, bits: int) -> None:
    problem = stack(8, 96, num_outputs, 0.0)
    sensitivities = normal(*problem.importance.shape, seed=5).exp().float()
    problem = dataclasses.replace(problem, importance=sensitivities / 7, noise=7.0)
    assert problem.form == form
    multiplier = int(problem.rows().costs.double().mean()) - 2 * bits * UNIT
    rehearsed = problem.rehearsed(multiplier)
    _, decoded = rehearsed.code(multiplier)
    missed = (decoded - problem.X).double()
    C = second_moment(96)
    true = torch.einsum("enk,nm,emk,ek->", missed, C, missed, sensitivities.double()) / 7
    assert rehearsed.rows().loss(rehearsed.stakes(sensitivities), multiplier) == pytest.approx(float(true), rel=0.1)
