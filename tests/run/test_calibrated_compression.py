from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from globe import CompressConfig, SettingsError, compress
from globe.bank.factors import Factors
from globe.bank_shape import BankShape
from globe.checkpoint.reader import open_checkpoint
from globe.checkpoint.report import Report
from globe.errors import OutOfMemoryError
from globe.experts.metric import LayerStatistics, input_metric, row_scales
from globe.experts.stack import ExpertStack, read_stack
from globe.experts.storage import to_storage
from globe.measure import samples
from globe.measure.calibrate import calibrate
from globe.measure.samples import LENGTH, NUM_SAMPLES, sample_windows
from globe.model.configuration import expert_layers
from globe.plan.scopes import BankPlan
from globe.run import prepare as prepare_module
from globe.run import scope as scope_module
from tests.model.compressed import FAMILIES, FAMILY_SETTINGS, LAYERS, D, E, P, tiny_model
from tests.random_experts import normal
from tests.tiny_sources import write_source, write_tokenizer

QUICK = CompressConfig(keep=0.7, steps=5, layers=(0, 2))
RANK, BASES = 5, 4
LETTERS = "".join(map(chr, range(ord("a"), ord("a") + 26))) + "ABCDEFGHIJKLMNOPQRSTUV"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that takes windows as long as outside of the suite, and its tokenizer."""
    folder = tmp_path_factory.mktemp("calibrated") / "source"
    write_source(folder)
    write_tokenizer(folder, LETTERS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LENGTH}))
    return folder


def written(path: Path, letters: str) -> str:
    path.write_text(letters)
    return str(path)


def random_letters(count: int, seed: int) -> str:
    drawn = torch.randint(len(LETTERS), (count,), generator=torch.Generator().manual_seed(seed))
    return "".join(LETTERS[place] for place in drawn)


def windows() -> torch.Tensor:
    return torch.randint(0, 48, (3, 16), generator=torch.Generator().manual_seed(1))


def read(folder: Path, model_type: str) -> tuple[ExpertStack, ExpertStack, dict[int, LayerStatistics]]:
    """The experts of a tiny model in a whole-model bank, plain and calibrated."""
    write_source(folder, model_type)
    checkpoint = open_checkpoint(folder)
    layers = {layer.index: layer for layer in expert_layers(checkpoint)}
    bank = BankPlan(tuple(range(LAYERS)), FAMILIES, BankShape(LAYERS * 3 * E, P, D, RANK, BASES))
    statistics = calibrate(tiny_model(model_type), windows(), range(LAYERS))
    plain = read_stack(checkpoint, layers, bank)
    return plain, read_stack(checkpoint, layers, bank, statistics), statistics


@pytest.mark.parametrize("model_type", FAMILY_SETTINGS)
def test_a_calibrated_stack_has_its_rows_scaled_and_a_second_moment_for_gate_and_up(
    tmp_path: Path, model_type: str
) -> None:
    plain, calibrated, statistics = read(tmp_path, model_type)
    assert calibrated.metric is not None
    for before, group in zip(plain.groups, calibrated.groups, strict=True):
        assert (group.layer, group.family, group.part, group.sigma) == (
            before.layer, before.family, before.part, before.sigma,
        )  # fmt: skip
        sigmas = {other.family: other.sigma for other in plain.groups if other.layer == group.layer}
        scales = row_scales(statistics[group.layer], sigmas)[group.family]
        torch.testing.assert_close(calibrated.weights[group.part], scales[:, :, None] * plain.weights[group.part])
        everything = slice(0, E)
        torch.testing.assert_close(
            group.restore(calibrated.weights[group.part], everything),
            before.restore(plain.weights[group.part], everything),
        )
        x = normal(E, RANK, D, dtype=torch.float32)
        metric = torch.eye(D) if group.family == "down" else input_metric(statistics[group.layer])
        torch.testing.assert_close(calibrated.metric.weigh(x, group.part), x @ metric)


def test_stored_adapters_are_exact_in_the_metric(tmp_path: Path) -> None:
    """(W − A N) C Nᵀ = 0 for every expert, in the units of the weights; the errors are plain Frobenius errors."""
    plain, calibrated, statistics = read(tmp_path, "qwen3_moe")
    plain = ExpertStack(plain.weights.double(), plain.groups)
    calibrated = dataclasses.replace(
        calibrated, weights=calibrated.weights.double(),
        metric=calibrated.metric and calibrated.metric.to(plain.weights),
    )  # fmt: skip
    num_matrices = len(plain.weights)
    factors = Factors(torch.empty(0), normal(num_matrices, BASES), normal(BASES, RANK, D, seed=1), "tanh")
    stored = to_storage(calibrated, factors, torch.float64, lambda_a=0.0)
    for group in plain.groups:
        key = (group.layer, group.family)
        features = torch.tanh(torch.einsum("em,mrd->erd", stored.codes[key], stored.bases))
        missed = group.sigma * plain.weights[group.part] - stored.adapters[key] @ features
        metric = torch.eye(D) if group.family == "down" else input_metric(statistics[group.layer])
        assert (missed @ metric.double() @ features.mT).abs().max() < 1e-5
        energy = (group.sigma * plain.weights[group.part]).square().sum()
        assert stored.errors[key] == pytest.approx(float((missed.square().sum() / energy).sqrt()), rel=1e-5)


def test_a_calibrated_run_is_resumed_without_another_pass(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(QUICK, calibrate=written(tmp_path / "text.txt", random_letters(700, seed=0)))
    compress(source, tmp_path / "whole", config)
    fits, fit = 0, scope_module.fit_bank

    def fit_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal fits
        fits += 1
        if fits == 2:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(scope_module, "fit_bank", fit_once)
        with pytest.raises(KeyboardInterrupt):
            compress(source, tmp_path / "out", config)
    written(tmp_path / "text.txt", random_letters(700, seed=1))
    with pytest.raises(SettingsError, match="calibration was"):
        compress(source, tmp_path / "out", config)
    written(tmp_path / "text.txt", random_letters(700, seed=0))
    with monkeypatch.context() as patch:
        patch.delattr(prepare_module, "calibrate")
        report = compress(source, tmp_path / "out", config)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "out" / "calibration.safetensors").exists()
    assert Report.read(tmp_path / "out") == report


def test_experts_never_reached_are_reported(source: Path, tmp_path: Path) -> None:
    """A text of one letter goes the same way everywhere: to two experts of six."""
    text = written(tmp_path / "text.txt", "a" * 600)
    config = dataclasses.replace(QUICK, calibrate=text, calibration_tokens=512, allocation="uniform")
    report = compress(source, tmp_path / "out", config)
    assert report.calibration is not None
    assert report.calibration.num_tokens == 512
    assert report.calibration.num_experts == 2 * E
    assert {layer: len(experts) for layer, experts in report.calibration.unreached.items()} == {"0": 4, "2": 4}
    assert report.calibration.num_unreached == 8
    alone = dataclasses.replace(QUICK, calibrate="none", allocation="uniform")
    assert compress(source, tmp_path / "plain", alone).calibration is None


def test_a_text_without_a_window_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    text = written(tmp_path / "short.txt", "a")
    with pytest.raises(SettingsError, match="give a longer text"):
        compress(source, tmp_path / "out", dataclasses.replace(QUICK, calibrate=text))
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture
def all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many and as long ones as outside of the suite."""
    monkeypatch.setattr(samples, "NUM_SAMPLES", NUM_SAMPLES)
    monkeypatch.setattr(samples, "LENGTH", LENGTH)


@pytest.mark.usefixtures("all_samples")
def test_by_default_the_model_is_calibrated_on_samples_of_its_own(source: Path, tmp_path: Path) -> None:
    report = compress(source, tmp_path / "out", QUICK)
    assert report.calibration is not None
    assert (report.calibration.text, report.calibration.num_tokens) == ("samples", NUM_SAMPLES * LENGTH)
    assert report.uncalibrated_because is None


def test_other_seeds_give_other_samples(source: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, allocation="uniform")
    first, second = (
        compress(source, tmp_path / f"{seed}", dataclasses.replace(settings, seed=seed)) for seed in (0, 1)
    )
    assert first.calibration is not None
    assert second.calibration is not None
    assert first.calibration.fingerprint != second.calibration.fingerprint


@pytest.mark.usefixtures("all_samples")
@torch.no_grad()
def test_samples_follow_the_distribution_of_the_model() -> None:
    """The mean surprise of its own samples is the model's mean entropy there; its generation settings do not matter."""
    model = tiny_model("qwen3_moe")
    model.lm_head.weight.mul_(40)
    model.generation_config.top_k, model.generation_config.temperature = 1, 0.1
    windows = sample_windows(model, seed=3)
    log_p = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
    surprise = -log_p.gather(2, windows[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert float(entropy.mean()) < 3
    spread = float((surprise - entropy).std()) / surprise.numel() ** 0.5
    assert abs(float((surprise - entropy).mean())) < 4 * spread
    assert len(windows[:, 0].unique()) > 16


@pytest.mark.parametrize("reason", ["does not generate", "takes"])
def test_a_model_that_cannot_be_run_is_fitted_uncalibrated_and_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    settings = dataclasses.replace(QUICK, allocation="uniform")

    if reason == "takes":
        monkeypatch.setattr("globe.measure.runnable.MEMORY_SHARE", 1e-9)
        monkeypatch.setattr("globe.measure.runnable.STREAMED_SHARE", 1e-9)
    else:
        monkeypatch.setattr("transformers.PreTrainedModel.can_generate", lambda *_: False)
    report = compress(source, tmp_path / "out", settings)
    assert report.calibration is None
    assert report.uncalibrated_because is not None
    assert reason in report.uncalibrated_because
    plain = compress(source, tmp_path / "plain", dataclasses.replace(settings, calibrate="none"))
    assert report.error == plain.error


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (TypeError("a bug"), TypeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemoryError),
    ],
)
def test_a_fault_while_sampling_is_not_taken_for_a_model_that_cannot_generate(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, expected: type[BaseException]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    where = (
        "globe.measure.samples.text_tokens"
        if isinstance(raised, TypeError)
        else "transformers.PreTrainedModel.generate"
    )
    monkeypatch.setattr(where, fail, raising=False)
    with pytest.raises(expected):
        compress(source, tmp_path / "out", QUICK)


def test_a_streamed_bank_is_calibrated_like_one_in_memory(source: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, scope="model", steps=15)
    streamed = compress(source, tmp_path / "streamed", dataclasses.replace(settings, stream=True))
    whole = compress(source, tmp_path / "whole", settings)
    assert streamed.calibration == whole.calibration  # the samples are the same ones
    assert streamed.error == pytest.approx(whole.error, rel=0.1)
