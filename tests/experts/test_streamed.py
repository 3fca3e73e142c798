from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from globe.bank.factors import Factors
from globe.checkpoint.kept import kept_tensors
from globe.experts import streamed
from globe.experts.metric import LayerStatistics
from globe.experts.stack import read_stack
from globe.experts.storage import to_storage
from globe.experts.streamed import StreamedExperts
from globe.terms import FAMILIES, Family
from globe.train.config import FitConfig
from globe.train.stream import ExpertParts, fit_parts
from tests.experts.conftest import Source, plan
from tests.model.compressed import D, E, P
from tests.random_experts import normal

CONFIG = FitConfig(rank=5, num_bases=4, align_steps=2, max_steps=3, device="cpu")
CASES: list[tuple[tuple[int, ...], tuple[Family, ...], bool]] = [
    ((0, 1, 2), FAMILIES, False),
    ((0, 2), ("gate", "down"), True),
    ((1,), ("up",), True),
]

pytestmark = pytest.mark.parametrize("source", ["per_expert"], indirect=True)


def stop(*_: object) -> None:
    raise InterruptedError


@pytest.mark.parametrize(("layers", "families", "calibrated"), CASES)
class TestAgainstMemory:
    @pytest.fixture
    def experts(
        self,
        source: Source,
        statistics: Mapping[int, LayerStatistics],
        layers: tuple[int, ...],
        families: tuple[Family, ...],
        calibrated: bool,
    ) -> StreamedExperts:
        return StreamedExperts(
            source.checkpoint, source.layers, plan(layers, families), statistics if calibrated else None
        )

    def test_the_parts_are_those_of_the_stack_in_memory(self, experts: StreamedExperts) -> None:
        whole = read_stack(experts.checkpoint, experts.layers, experts.bank, experts.statistics)
        parts = experts.parts()
        assert list(parts.sizes) == [E * len(experts.bank.families)] * len(experts.bank.layers)
        assert (parts.rows, parts.columns) == (P, D)
        x = normal(len(whole.weights), 2, D, dtype=torch.float32)
        for number, place in enumerate(parts.slices()):
            problem = parts.read(number)
            assert torch.equal(problem.weights, whole.weights[place])
            assert (problem.metric is None) == (whole.metric is None)
            if problem.metric is not None and whole.metric is not None:
                everything = slice(0, place.stop - place.start)
                weighed = problem.metric.to(x).weigh(x[place], everything)
                torch.testing.assert_close(weighed, whole.metric.to(x).weigh(x[place], place))
        assert sum(place.stop - place.start for place in parts.slices()) == len(whole.weights)

    def test_what_is_stored_is_what_is_stored_from_memory(self, experts: StreamedExperts) -> None:
        whole = read_stack(experts.checkpoint, experts.layers, experts.bank, experts.statistics)
        codes, bases = normal(len(whole.weights), 4), normal(4, 5, D, seed=1)
        factors = Factors(torch.empty(0), codes.float(), bases.float(), "tanh")
        expected = to_storage(whole, factors, torch.bfloat16)
        found = list(experts.store(factors, torch.bfloat16))
        assert len(found) == len(experts.bank.layers)
        keys = [key for stored in found for key in stored.errors]
        assert keys == [(layer, family) for layer in experts.bank.layers for family in experts.bank.families]
        for stored in found:
            assert torch.equal(stored.bases, expected.bases)
            for key in stored.errors:
                assert torch.equal(stored.codes[key], expected.codes[key])
                torch.testing.assert_close(stored.adapters[key], expected.adapters[key])
                assert stored.errors[key] == pytest.approx(expected.errors[key], rel=1e-5)
                assert stored.expert_errors[key] == pytest.approx(expected.expert_errors[key], rel=1e-5)

    def test_the_fit_is_that_of_the_parts_in_memory(self, experts: StreamedExperts, tmp_path: Path) -> None:
        problems = [experts.parts().read(number) for number in range(len(experts.bank.layers))]
        parts = ExpertParts([len(problem.weights) for problem in problems], P, D, problems.__getitem__)
        expected = fit_parts(parts, CONFIG)
        found = experts.fit(CONFIG, lambda _: None, tmp_path / "state.safetensors")
        assert found.history == expected.history
        assert torch.equal(found.factors.codes, expected.factors.codes)
        assert torch.equal(found.factors.bases, expected.factors.bases)
        assert not list(tmp_path.iterdir())  # it took less than five minutes


def test_a_fit_that_was_stopped_goes_on_from_its_saved_state(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = StreamedExperts(source.checkpoint, source.layers, plan(), None)
    whole = experts.fit(CONFIG, lambda _: None, tmp_path / "none")
    monkeypatch.setattr(streamed, "SAVE_SECONDS", 0.0)
    state = tmp_path / "state.safetensors"
    with pytest.raises(InterruptedError):
        experts.fit(CONFIG, lambda record: stop() if record.step == 2 else None, state)
    assert kept_tensors(state) is not None
    seen: list[int] = []
    again = experts.fit(CONFIG, lambda record: seen.append(record.step), state)
    assert seen == [2, 3]
    assert again.history == whole.history
    assert torch.equal(again.factors.bases, whole.factors.bases)
