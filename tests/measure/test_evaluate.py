from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch

from globe import EvaluateConfig, SettingsError, evaluate
from globe.checkpoint.shipped import MODEL
from globe.measure.evaluate import evaluate_model, token_windows
from globe.measure.streamed_logits import StreamedLogits
from globe.measure.texts import read_text
from globe.model.loading import load
from globe.model.source import open_source
from globe.model.streamed import StreamedModel
from tests.model.compressed import tiny_model
from tests.tiny_sources import write_source


def test_perplexity_and_divergence_equal_a_naive_loop() -> None:
    model, reference = tiny_model("olmoe", seed=0), tiny_model("olmoe", seed=1)
    windows = torch.randint(3, 48, (5, 7), generator=torch.Generator().manual_seed(0))
    result = evaluate_model(model, windows, bytes_per_token=2.5, batch=2, reference=reference)
    nats, divergence, agreed = [], [], []
    with torch.no_grad():
        for row in windows:
            p = model(input_ids=row[None]).logits[0].double().softmax(-1)
            q = reference(input_ids=row[None]).logits[0].double().softmax(-1)
            for position in range(len(row) - 1):
                nats.append(-math.log(p[position, row[position + 1]]))
                divergence.append(float((q[position] * (q[position] / p[position]).log()).sum()))
                agreed.append(bool(p[position].argmax() == q[position].argmax()))
    assert result.num_tokens == len(nats) == 30
    assert result.perplexity == pytest.approx(math.exp(sum(nats) / 30), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(sum(nats) / 30 / math.log(2) / 2.5, rel=1e-4)
    assert result.kl == pytest.approx(sum(divergence) / 30, rel=1e-3)
    assert result.agreement == pytest.approx(sum(agreed) / 30)
    means = [sum(divergence[6 * row : 6 * row + 6]) / 6 for row in range(5)]
    assert result.kl_error == pytest.approx(statistics.stdev(means) / math.sqrt(5), rel=1e-3)
    alone = evaluate_model(reference, windows, bytes_per_token=2.5)
    assert result.reference_perplexity == pytest.approx(alone.perplexity)
    assert evaluate_model(model, windows[:1], 2.5, reference=reference).kl_error is None


def test_a_model_has_no_divergence_from_itself() -> None:
    model = tiny_model("mixtral")
    windows = torch.randint(3, 48, (2, 8), generator=torch.Generator().manual_seed(0))
    result = evaluate_model(model, windows, 3.0, reference=model)
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.agreement == 1


def test_a_reference_that_runs_a_layer_at_a_time_is_that_which_is_loaded(tmp_path: Path) -> None:
    write_source(tmp_path)
    loaded, streamed = load(tmp_path, "cpu"), StreamedModel(open_source(tmp_path), "cpu")
    model = tiny_model("qwen2_moe", seed=1)
    windows = torch.randint(3, 48, (5, 8), generator=torch.Generator().manual_seed(0))
    expected = evaluate_model(model, windows, 3.0, batch=2, reference=loaded)
    logits = StreamedLogits(streamed, windows, 2, name="the reference", because="it is large")
    assert evaluate_model(model, windows, 3.0, batch=2, reference=logits) == expected


class Bytes:
    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_windows_do_not_overlap_and_stop_at_the_limit() -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    windows, bytes_per_token = token_windows(Bytes(), text, EvaluateConfig(max_tokens=50, length=11))
    assert windows.shape == (5, 11)
    assert windows.flatten().tolist() == list(text.encode()[:55])
    assert bytes_per_token == 1


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(SettingsError, match="longer text"):
        token_windows(Bytes(), "abc", EvaluateConfig())


def test_an_unknown_text_is_refused() -> None:
    with pytest.raises(SettingsError, match="calibration, heldout"):
        read_text("no-such-split")


def test_the_shipped_model_is_trained() -> None:
    result = evaluate("shipped", EvaluateConfig(max_tokens=4096))
    assert result.bits_per_byte < 1.9


def test_the_splits_share_no_file() -> None:
    separator = "<|endoftext|>"
    calibration, heldout = (set(read_text(split).split(separator)) for split in ("calibration", "heldout"))
    assert not calibration & heldout


def test_a_text_file_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("import os\n" * 500)
    result = evaluate(MODEL, EvaluateConfig(text=str(tmp_path / "text.txt"), max_tokens=512))
    assert result.perplexity < 3
