from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from globe.checkpoint.layout import LanguageModel
from globe.checkpoint.reader import open_checkpoint
from globe.cli.main import Compress, Evaluate, Inspect, Sweep, _parse, main
from globe.measure.evaluate import generate
from globe.measure.settings import EvaluateConfig
from globe.plan.settings import CompressConfig
from globe.run import scope as scope_module
from globe.sweeps.settings import SweepConfig
from globe.version import __version__
from tests import coded
from tests.tiny_sources import write_source, write_tokenizer

SETTINGS = {
    "compress": (Compress, CompressConfig),
    "sweep": (Sweep, SweepConfig, EvaluateConfig),
    "evaluate": (Evaluate, EvaluateConfig),
    "inspect": (Inspect, CompressConfig),
}
LETTERS = "".join(map(chr, range(ord("A"), ord("A") + 48)))
BANKS = ("--steps", "2", "--keep", "0.75")
FAST = ("--steps", "3", "--keep", "0.7", "--layers", "3")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The shipped model after a short run, and what was printed."""
    folder = tmp_path_factory.mktemp("compressed") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["compress", "-o", str(folder), *FAST]) == 0
    return folder, printed.getvalue()


def test_compress_evaluate_inspect_and_export_the_shipped_model(
    compressed: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("globe.report.show.generate", functools.partial(generate, max_new_tokens=8))
    folder, out = compressed
    assert "layer 3 gate+up+down: relative error" in out
    few = "--max-tokens", 512, "--compose-cache", 10**6
    status, out, _ = run(capsys, "evaluate", folder, *few, "--prompt", "import os\n")
    assert status == 0
    assert "composed experts kept: 589.82 kB of 1.00 MB, which served " in out
    assert "original" in out
    assert "KL to the original" in out
    assert "relative error, down" in out
    status, out, _ = run(capsys, "inspect", folder)
    assert status == 0
    assert "compressed from shipped" in out
    status, out, _ = run(capsys, "export", folder, "-o", tmp_path / "dense")
    assert status == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_the_commands_take_a_coded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--bits", "3", "--layers", "3", "--calibrate", "none", "--allocation", "uniform")
    status, out, _ = run(capsys, "inspect", "--plan", *given)
    assert status == 0
    assert re.search(r"experts     in (2\.99\d|3\.000) bits a weight, everything counted", out)
    predicted = re.search(r"whole model .* -> (\d+\.\d\d) MB", out)
    status, out, _ = run(capsys, "compress", "-o", tmp_path / "out", *given)
    assert status == 0
    assert re.search(r"layer 3: 2\.9\d bits, relative error 0\.\d{4}|layer 3: 3\.00 bits, relative error 0\.\d{4}", out)
    assert re.search(r"experts coded   in (2\.99\d|3\.000) bits a weight, everything counted", out)
    stored = re.search(r"whole model     (\d+\.\d\d) MB of", out)
    assert predicted is not None
    assert stored is not None
    assert float(predicted[1]) == pytest.approx(float(stored[1]), abs=0.02)
    status, out, _ = run(capsys, "evaluate", tmp_path / "out", "--max-tokens", 512, "--compose-cache", 10**6)
    assert status == 0
    assert "KL to the original" in out
    assert "relative error, down" in out
    status, out, _ = run(capsys, "inspect", tmp_path / "out")
    assert "bits a weight of the compressed families" in out
    assert "bank" not in out
    for command in ("verify", "report", "verify"):
        assert run(capsys, command, tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "report.html").exists()
    assert run(capsys, "export", tmp_path / "out", "-o", tmp_path / "dense")[0] == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_coded_model_that_could_not_be_measured_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, tokens = tmp_path / "source", ("--calibration-tokens", 512)
    coded.write_source(source)
    write_tokenizer(source, LETTERS)
    monkeypatch.setattr("globe.measure.runnable.MEMORY_SHARE", 0.0)
    status, out, _ = run(capsys, "compress", source, "-o", tmp_path / "streamed", "--bits", "3", *tokens)
    assert status == 0
    assert "calibrated      on 512 tokens of calibration; " in out
    assert "the model ran a layer at a time, so not on samples of its own: the model takes" in out
    monkeypatch.setattr("globe.measure.runnable.STREAMED_SHARE", 0.0)
    status, out, _ = run(capsys, "compress", source, "-o", tmp_path / "out", "--bits", "3")
    assert status == 0
    assert "fitted to the weights alone: the model takes" in out
    assert "every expert counts the same: the model takes" in out


def test_a_bare_calibrate_means_the_shipped_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("compress", "-o", str(tmp_path / "out"), *FAST, "--calibration-tokens", "512", "--calibrate")
    assert _parse(command) == _parse((*command, "calibration"))
    status, out, _ = run(capsys, *command)
    assert status == 0
    assert "calibrated      on 512 tokens of calibration; " in out


def test_a_saved_copy_of_a_compressed_model_is_evaluated_alone(
    compressed: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_pretrained(compressed[0]).save_pretrained(tmp_path / "copy")
    AutoTokenizer.from_pretrained(compressed[0]).save_pretrained(tmp_path / "copy")
    status, out, _ = run(capsys, "evaluate", tmp_path / "copy", "--max-tokens", 256)
    assert status == 0
    assert "compressed" in out
    assert "original" not in out


def test_inspect_shows_the_plan_and_does_no_work(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", "--keep", "0.5", "--scope", "model", "--plan")
    assert status == 0
    assert "layers 0-13 gate+up+down" in out
    assert "whole model" in out


def test_inspect_tells_what_each_budget_gives_without_reading_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "source")
    monkeypatch.setattr("globe.checkpoint.reader.safe_open", None)
    status, out, _ = run(capsys, "inspect", tmp_path / "source", "--bits", "3")
    assert status == 0
    tensors = open_checkpoint(tmp_path / "source").tensors.values()
    experts = sum(tensor.nbytes for tensor in tensors if ".experts." in tensor.name)
    kept = sum(tensor.nbytes for tensor in tensors) - experts + 4
    for bits in (4, 6):
        assert re.search(rf"--bits {bits} │ +{(kept + experts // 32 * bits) / 1000:.2f} kB", out)
    assert re.search(r"--keep 0\.75 │ +\d+\.\d\d kB", out)
    assert re.search(rf"reads +{(kept - 4 + experts) / 1000:.2f} kB of .*source", out)
    assert re.search(r"writes +\d+\.\d\d kB \(\d+\.\d%\); .* are free", out)
    assert re.search(r"needs +about .* of memory; .*\ntakes +about 0:\d\d on this cpu", out)
    monkeypatch.setattr("globe.measure.runnable.MEMORY_SHARE", 0.0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    status, out, _ = run(capsys, "inspect", tmp_path / "source", "--bits", "3")
    assert "note: the disk is too small for that" in out
    assert "to run, over 0% of what there is" in out


STARTS_FAST = """
import contextlib, sys
from types import SimpleNamespace
from globe.cli.main import main
with contextlib.suppress(SystemExit):
    main(["--help"])
for command in ("verify", "push"):
    main([command, "nowhere", *["owner/name"][: command == "push"]])
HEAVY = {"torch", "transformers", "matplotlib"}
assert not HEAVY & sys.modules.keys()
from globe.report import inspection
from globe.run import outlook
confirmed = inspection.confirmed
def confirm(outlined):
    print("loaded", HEAVY & sys.modules.keys())
    return confirmed(outlined)
def foresee(*_):
    print("slow", {"torch._dynamo", "transformers.modeling_utils", "accelerate", "numba"} & sys.modules.keys())
    return SimpleNamespace(measuring=60.0, working=1.0)
inspection.confirmed, outlook._foresee = confirm, foresee
main(["inspect"])
"""


def test_what_headers_say_comes_before_what_takes_long_to_import() -> None:
    done = subprocess.run([sys.executable, "-c", STARTS_FAST], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"needs .*\nloaded set\(\)\nslow set\(\)\ntakes +about 1:01 on this", done.stdout)


def test_inspect_says_where_transformers_reads_config_json_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "source")
    status, out, _ = run(capsys, "inspect", tmp_path / "source")
    assert status == 0
    assert out.count("budgets") == 1
    monkeypatch.setattr("globe.model.configuration.language_model", lambda _: LanguageModel("qwen3_moe", num_layers=1))
    status, out, _ = run(capsys, "inspect", tmp_path / "source")
    assert status == 0
    before, after = out.split("note: transformers reads this config.json otherwise")
    assert after.count("takes") == out.count("takes") == 1
    assert "0-2" in before
    assert "│      0 │" in after


def test_inspect_shows_once_what_transformers_has_to_fill_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "source")
    monkeypatch.setattr("globe.run.outline.stated_model", lambda _: None)
    status, out, _ = run(capsys, "inspect", tmp_path / "source")
    assert status == 0
    assert out.count("budgets") == 1
    assert "otherwise" not in out


def test_coarse_experts_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "coarse")
    status, out, _ = run(capsys, "inspect", tmp_path / "coarse", "--keep", "0.75")
    assert status == 0
    assert "coarse" in out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"globe {__version__}\n", "")


def test_env_names_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "env")
    assert status == 0
    assert "transformers" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "no/such/model/anywhere", "-o", "x"), "does not exist"),
        (("compress", "-o", "x", "--keep", "0.00001"), "choose from"),
        (("compress", "-o", "x", "--keep", "75"), "(75 % is 0.75)"),
        (("compress", "-o", "x", "--bits", "1"), "must be from 1.5 to 8"),
        (("compress", "-o", "x", "--bits", "3", "--keep", "0.5"), "give one of keep, bits"),
        (("compress", "-o", "x", "--steps", "9"), "steps is a setting of banks, which bits has none of: give keep"),
        (("compress", "-o", "x", "--scope", "banana"), "choose layer, model or a number of layers"),
        (("compress", "-o", "x", "--layers", "0-3", "7,99"), "layers 99 hold no routed experts"),
        (("compress", "-o", "x", "--calibrate", "wikitext"), "nor spelled as a data set of the Hub: OWNER/NAME"),
        (("evaluate", "--text", "nothing"), "neither a file nor"),
        (("evaluate", "--length", "1"), "at least 2"),
        (("evaluate", "--device", "nowhere"), "choose auto, cpu, cuda, cuda:1 or mps"),
        (("evaluate", "./nothing"), "does not exist"),
        (("report", "nothing"), "has no report.json; there is no such folder"),
        (("verify", "nothing"), "cannot be proved: there is no such folder"),
        (("export", "shipped", "-o", "x"), "not compressed"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert err.startswith("error: ")
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "verify", "report", "export"])
def test_a_run_that_has_not_ended_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.partial").mkdir()
    status, _, err = run(capsys, command, "small", *(("-o", "dense") if command == "export" else ()))
    assert status == 1
    assert "its run is not finished and lies in small.partial" in " ".join(err.split())


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    write_source(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(scope_module, "fit_bank", interrupt)
        status, _, err = run(capsys, "compress", tmp_path / "source", "-o", tmp_path / "out", *BANKS)
    assert status == 130
    assert "interrupted: the same command goes on" in err
    command = ("compress", tmp_path / "source", "-o", tmp_path / "out", *BANKS)
    assert run(capsys, *command)[0] == 0
    status, _, err = run(capsys, *command)
    assert (status, err[:10]) == (0, "finished: ")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_as_ctrl_c_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    write_source(tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(scope_module, "fit_bank", lambda *_, **__: signal.raise_signal(number))
        ended, _, err = run(capsys, "compress", tmp_path / "source", "-o", tmp_path / "out", *BANKS)
    assert ended == status
    assert f"ended by {signal.Signals(number).name}: the same command goes on after the last finished scope" in err
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr("globe.report.show.show_environment", lambda _: signal.raise_signal(signal.SIGHUP))
        assert run(capsys, "env")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, earlier)


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_what_the_file_system_refuses_is_an_error_with_its_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", "/some/file")
    monkeypatch.setattr("globe.report.show.show_environment", failing(denied))
    status, _, err = run(capsys, "env")
    assert status == 1
    assert err == "error: /some/file: Permission denied\n"


def test_a_fault_of_its_own_is_said_in_a_paragraph_with_the_traceback_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("globe.report.show.show_environment", failing(KeyError("x")))
    status, _, err = run(capsys, "env")
    assert status == 70
    assert err.startswith("bug: KeyError: 'x' (in ")
    assert "please report it" in err
    assert "Traceback" not in err
    (saved,) = tmp_path.iterdir()
    assert str(saved) in err
    assert "KeyError: 'x'" in saved.read_text()


@pytest.mark.parametrize("arguments", [("env",), ("--version",), ("compress", "--help")])
def test_a_closed_pipe_ends_it_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:  # closing it writes what is left, as the end of a process does
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(arguments) == 141
    assert capsys.readouterr().err == ""


def test_where_index_and_files_disagree_is_said_by_inspect_and_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"].pop("lm_head.weight")
    path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "mtp.fc.weight": shard}}))
    bare = ("--keep", 0.7, "--steps", 1, "--calibrate", "none", "--allocation", "uniform")
    status, out, _ = run(capsys, "inspect", tmp_path / "source", *bare)
    assert status == 0
    assert "lists 1 tensors that no file holds; they are left out: mtp.fc.weight" in out
    status, out, _ = run(capsys, "compress", tmp_path / "source", "-o", tmp_path / "out", *bare)
    assert status == 0
    assert "they are read: lm_head.weight" in out
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["notes"]) == 2


def test_without_arguments_it_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    assert "inspect" in capsys.readouterr().out


def test_help_has_no_line_breaks_of_the_source_and_names_what_to_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "4000")
    for command in ("compress", "sweep", "evaluate", "inspect"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert "[MODEL]" in out
        assert "{None}" not in out
        for kind in SETTINGS[command]:
            docs = [
                " ".join(doc.split()) for doc in re.findall(r'^    """(.*?)"""', inspect.getsource(kind), re.M | re.S)
            ]
            assert len(docs) >= len(dataclasses.fields(kind))
            assert [doc for doc in docs[1:] if doc not in out] == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_scripts_know_the_commands_and_their_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--tyro-print-completion", shell])
    assert stopped.value.code in (0, None)
    out = capsys.readouterr().out
    assert "inspect" in out
    assert "--warm-start" in out
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=out, text=True, check=False).returncode == 0


def test_a_missing_tracker_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    status, _, err = run(capsys, "compress", "-o", tmp_path / "out", "--track", "trackio", *FAST)
    assert status == 1
    assert "pip install trackio" in err


def test_a_tracker_sees_the_settings_every_step_and_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[dict[str, object]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    finished: list[bool] = []
    tracker = SimpleNamespace(
        init=lambda **settings: started.append(settings),
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: finished.append(True),
    )
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    write_source(tmp_path / "source")
    few = "--steps", 3, "--keep", 0.7, "--layers", 1
    status, _, _ = run(capsys, "compress", tmp_path / "source", "-o", tmp_path / "out", "--track", "wandb", *few)
    assert status == 0
    assert [settings["config"]["keep"] for settings in started] == [0.7]  # pyright: ignore[reportIndexIssue]
    errors = [values["layer 1 gate+up+down/error"] for _, values in logged[:-1]]
    assert len(errors) == 4
    assert errors == sorted(errors, reverse=True)
    assert [step for step, _ in logged] == list(range(5))
    assert logged[-1][1].keys() == {"error", "seconds"}
    assert finished == [True]


def test_the_core_imports_no_tracker() -> None:
    code = "import globe, globe.cli, sys; sys.exit(any(m in sys.modules for m in ('wandb', 'trackio', 'tensorboard')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
