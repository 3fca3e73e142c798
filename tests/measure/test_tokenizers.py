from __future__ import annotations

import json
from pathlib import Path

import pytest

from globe import CheckpointError, CompressConfig, EvaluateConfig, SweepConfig, compress, evaluate, export_dense
from globe.checkpoint.shipped import MODEL
from globe.errors import UntrustedCodeError
from globe.measure.tokenizers import encode, load_tokenizer
from tests.tiny_sources import write_source, write_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"
CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizer
from .letters import LETTERS

(Path({folder!r}) / "ran").touch()

class Letters(PreTrainedTokenizer):
    vocab_files_names = {{}}

    @property
    def vocab_size(self):
        return len(LETTERS)

    def get_vocab(self):
        return {{letter: place for place, letter in enumerate(LETTERS)}}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return max(LETTERS.find(token), 0)

    def _convert_id_to_token(self, index):
        return LETTERS[index]
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "source")
    (tmp_path / "source" / "tokenizer_config.json").unlink()
    return tmp_path / "source"


@pytest.fixture
def coded(source: Path) -> Path:
    """A model whose tokenizer is code of its own; running it leaves a file `ran`."""
    (source / "tokenization_letters.py").write_text(CODE.format(folder=str(source)))
    (source / "letters.py").write_text(f"LETTERS = {LETTERS!r}\n")
    auto_map = {"AutoTokenizer": ["tokenization_letters.Letters", None]}
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Letters", "auto_map": auto_map}))
    return source


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("a line of letters, and one more.\n" * 40)
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("config", "lacks"),
    [
        (None, "merges.txt, tokenizer.json, vocab.json"),
        ({"model_max_length": 64}, "merges.txt, tokenizer.json, vocab.json"),
        ({"tokenizer_class": "LlamaTokenizerFast"}, "tokenizer.json, tokenizer.model"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "tokenizer.json"),
        ({"tokenizer_class": "Unheard"}, "tokenizer.json"),
        ({"tokenizer_class": "pipeline"}, "tokenizer.json"),
        ({"tokenizer_class": 3}, "tokenizer.json"),
    ],
)
def test_a_tokenizer_without_files_is_not_made_up(source: Path, config: object, lacks: str) -> None:
    if config is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"has no tokenizer: it lacks {lacks}; copy"):
        load_tokenizer(source)


def test_half_of_a_vocabulary_is_none(source: Path) -> None:
    (source / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(LETTERS)}))
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json; copy"):
        load_tokenizer(source)
    (source / "merges.txt").write_text("#version: 0.2\n")
    assert load_tokenizer(source)("abc")["input_ids"] == [0, 1, 2]


def test_a_class_that_needs_no_files_is_a_tokenizer(source: Path) -> None:
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(source)("abc", add_special_tokens=False)["input_ids"] == [100, 101, 102]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"version": "1.0", "model": {}}', "version https://git-lfs"])
def test_a_damaged_tokenizer_is_told(source: Path, content: str) -> None:
    (source / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*copy them from where the model came from"):
        load_tokenizer(source)


def test_a_tokenizer_that_knows_nothing_of_a_text_is_blamed_and_not_the_text(source: Path, text: Path) -> None:
    (source / "vocab.json").write_text('{"x": 0}')
    (source / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError, match="tokens of a text of 528 characters: unless"):
        evaluate(source, EvaluateConfig(text=str(text), length=32, max_tokens=1))


def test_tokens_that_the_model_does_not_know_are_another_models(source: Path, text: Path) -> None:
    write_tokenizer(source, "".join(map(chr, range(60, 128))) + LETTERS)
    config = EvaluateConfig(text=str(text), length=32, max_tokens=64)
    with pytest.raises(CheckpointError, match=r"has token \d+, and the model knows 48"):
        evaluate(source, config)
    with pytest.raises(CheckpointError, match=r"has token \d+, and the model knows 48"):
        compress(source, source.with_name("out"), CompressConfig(keep=0.75, calibrate=str(text), steps=2))


def test_code_is_not_run_unasked(coded: Path, text: Path) -> None:
    with pytest.raises(UntrustedCodeError, match=r"\(tokenization_letters.py\).*--trust-remote-code"):
        load_tokenizer(coded)
    with pytest.raises(UntrustedCodeError):
        evaluate(coded, EvaluateConfig(text=str(text), length=32))
    assert not (coded / "ran").exists()


def test_code_is_run_when_asked_and_that_of_the_model_is_not(coded: Path, text: Path) -> None:
    config = json.loads((coded / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (coded / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    for name in ("configuration_x", "modeling_x"):
        (coded / f"{name}.py").write_text("raise AssertionError('run')")
    assert load_tokenizer(coded, trust_remote_code=True)("abc")["input_ids"] == [0, 1, 2]
    trusting = EvaluateConfig(text=str(text), length=32, max_tokens=64, trust_remote_code=True)
    assert evaluate(coded, trusting).num_tokens == 62


def test_code_of_another_repository_is_not_fetched(coded: Path) -> None:
    auto_map = {"AutoTokenizer": ["owner/other--tokenization_letters.Letters", None]}
    (coded / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    with pytest.raises(CheckpointError, match="code of another repository, owner/other"):
        load_tokenizer(coded, trust_remote_code=True)


def test_outputs_have_the_code_and_a_calibration_that_would_run_it_says_so(
    coded: Path, text: Path, tmp_path: Path
) -> None:
    settings = CompressConfig(calibrate=str(text), keep=0.7, steps=2)
    report = compress(coded, tmp_path / "small", settings)
    assert report.calibration is not None
    assert report.calibration.text == "samples"
    assert [note for note in report.notes if "on samples of the model itself, not on" in note] == report.notes
    export_dense(tmp_path / "small", tmp_path / "dense")
    assert not (coded / "ran").exists()
    for name in ("small", "dense"):
        assert not (tmp_path / name / "ran").exists()
        assert load_tokenizer(tmp_path / name, trust_remote_code=True)("abc")["input_ids"] == [0, 1, 2]


def test_a_calibration_that_may_run_it_does(coded: Path, text: Path, tmp_path: Path) -> None:
    settings = CompressConfig(calibrate=str(text), keep=0.7, steps=2, trust_remote_code=True)
    report = compress(coded, tmp_path / "small", settings)
    assert report.calibration is not None
    assert report.calibration.text == str(text)
    assert report.notes == []
    assert report.config["trust_remote_code"] is True
    assert json.loads((tmp_path / "small" / "report.json").read_text())["config"]["trust_remote_code"] is True


def test_one_word_trusts_for_all_points_of_a_sweep() -> None:
    config = SweepConfig(trust_remote_code=True)
    assert config.common.trust_remote_code
    assert config.at(config.points()[0]).trust_remote_code
    assert config.evaluate.trust_remote_code
    assert not SweepConfig().evaluate.trust_remote_code


def test_the_shipped_model_has_its_tokenizer() -> None:
    assert len(load_tokenizer(MODEL)) == 2048


def test_a_tokenizer_that_cannot_read_a_text_is_blamed_itself() -> None:
    def fails(*_: object, **__: object) -> None:
        raise Exception("WordLevel error: Missing [UNK]")  # as the tokenizers library raises it

    with pytest.raises(CheckpointError, match=r"cannot read the text .*its files are damaged"):
        encode(fails, "text")
