"""The command line: compress, sweep, evaluate, compare, lm-eval, serve, export, imatrix,
verify, push, inspect, report, env."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from globe.cli.arguments import registry
from globe.cli.ending import FAILED, close_quietly, describe, stoppable, tell, tell_bug, tell_stopped
from globe.cli.launch import gpus_for, start_again
from globe.errors import FinishedError, GlobeError, SettingsError
from globe.measure.settings import EvaluateConfig
from globe.plan.budget import DEFAULT_BITS
from globe.plan.recipe import BUDGET, read_recipe
from globe.plan.settings import CompressConfig
from globe.run.ranks import ALONE, Ranks, with_ranks
from globe.sweeps.settings import SweepConfig
from globe.terminal import Terminal, tame_logging
from globe.terms import Track
from globe.version import __version__

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


@dataclasses.dataclass(frozen=True)
class Compress:
    """Compress a model's routed experts into a Hugging Face checkpoint."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write. A run that was killed goes on when the same command is given again."""
    model: Model = "shipped"
    """Local folder or Hub id; without one, the small model that ships with GloBE."""
    recipe: Path | None = None
    """YAML with model and settings, such as the recipe.yaml of an output; what is given beside it wins."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    cache_dir: Path | None = None
    """Folder that keeps a model of the Hub, in place of the usual cache."""
    low_disk: bool = False
    """Keep a few shards of a model of the Hub at a time, in place of the whole, and fetch each again for each of about
    seven passes; the model is run a layer at a time."""
    fit: str | None = None
    """Bytes that all weights may take, such as 16GB, in place of bits: the best model within them."""
    max_kl: float | None = None
    """KL to the original in nats per token, in place of bits: the smallest model within it, by a few trials."""
    config: Annotated[CompressConfig, tyro.conf.arg(name="")] = CompressConfig()
    track: Track = "none"
    """Experiment tracker."""
    overwrite: bool = False
    """Replace an output that GloBE wrote earlier, when the new one is whole, and start an unfinished run with other
    settings anew."""
    go_on: ClassVar[str] = "the same command goes on after the last finished scope"

    def run(self, console: Terminal, ranks: Ranks = ALONE) -> None:
        from globe.run.folder import check_output, is_written, place_of_shards

        check_output(self.output)  # the other imports take seconds

        from globe.cli.progress import LiveProgress, PlainProgress
        from globe.cli.track import make_tracker
        from globe.report.inspection import show_outlook
        from globe.report.show import fitted_config, show_report
        from globe.run.compress import compress
        from globe.run.observer import Observer
        from globe.run.outline import outline
        from globe.run.size import compress_within

        live = LiveProgress(console, self.config.steps) if console.is_terminal else PlainProgress(console)
        observers: list[Observer] = [live]
        if self.track != "none":
            observers.append(make_tracker(self.track, self.config, self.output.with_name(f"{self.output.name}.track")))
        if self.max_kl is not None and self.low_disk:
            raise SettingsError(
                "max_kl judges beside the original, which is to be here: leave out low_disk, or give bits"
            )
        config, place = self.config, place_of_shards(self.output) if self.low_disk else None
        outlined = outline(self.model, config, self.revision, self.cache_dir, place)
        if self.fit is not None:
            config = fitted_config(console, outlined, config, self.fit)
            outlined = outline(self.model, config, self.revision, self.cache_dir, place)
        if self.overwrite or not is_written(self.output):  # or else there is nothing to do, which only the run can tell
            show_outlook(console, outlined, self.output, ranks)
            if self.max_kl is not None:
                console.print("which is the first trial; the size is what is looked for")
        if self.max_kl is not None:
            make = functools.partial(compress_within, max_kl=self.max_kl)
        else:
            make = functools.partial(compress, low_disk=self.low_disk)
        report = make(
            self.model,
            self.output,
            config=config,
            observers=observers,
            overwrite=self.overwrite,
            revision=self.revision,
            cache=self.cache_dir,
            ranks=ranks,
        )
        show_report(console, report, self.output)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Compress a model at every point of a grid of settings, and judge each."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the records, the table and the picture. A sweep that was killed goes on when the same command is given
    again."""
    model: Model = "shipped"
    """Local folder or Hub id; without one, the small model that ships with GloBE."""
    config: Annotated[SweepConfig, tyro.conf.arg(name="")] = SweepConfig()
    overwrite: bool = False
    """Start a sweep with other settings anew; its finished points are lost."""
    go_on: ClassVar[str] = "the same command goes on after the last finished point"

    def run(self, console: Terminal) -> None:
        from globe.sweeps.progress import LiveSweep, PlainSweep
        from globe.sweeps.sweep import sweep
        from globe.sweeps.view import show_sweep

        watch = LiveSweep(console, self.config.common.steps) if console.is_terminal else PlainSweep(console)
        result = sweep(self.model, self.output, self.config, watch, overwrite=self.overwrite)
        show_sweep(console, result, self.output)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Perplexity and size of a model beside those of the one that it came from."""

    model: Model = "shipped"
    """Folder or Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    reference: str | None = None
    """Model to compare with; by default the source of a compressed model, where found; `none` for no comparison."""
    prompt: str | None = None
    """Also continue this text with both models, sampled with the same seed."""
    reference_logits: Path | None = None
    """File that keeps the reference's logits: written if it is not there, read in place of the reference if it is."""
    compose_cache: int = 0
    """Bytes of composed experts that a compressed model may keep beside its factors: faster, with the same results."""
    verify: bool = True
    """Compare the files of a folder that GloBE wrote with its manifest first."""
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")] = EvaluateConfig()

    def run(self, console: Terminal) -> None:
        from globe.checkpoint.reader import open_checkpoint
        from globe.report.show import show_evaluation

        model = self.model
        if self.revision is not None:
            model = str(open_checkpoint(model, self.revision).fetched())
        show_evaluation(
            console,
            model,
            self.reference,
            self.prompt,
            self.config,
            self.compose_cache,
            logits=self.reference_logits,
            verify=self.verify,
        )


@dataclasses.dataclass(frozen=True)
class Compare:
    """Several compressed models of one source side by side, from their records."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR [DIR ...]")]
    """Folders of compressed models that were evaluated."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Picture to draw: .png, .svg or .pdf."""

    def run(self, console: Terminal) -> None:
        from globe.report.compare import show_comparison

        if not self.folders:
            raise SettingsError("there is nothing to compare: name the folders of compressed models")
        show_comparison(console, self.folders, self.output)


@dataclasses.dataclass(frozen=True)
class LmEval:
    """Run lm-eval on a compressed model: its own options are in `globe lm-eval -h`."""

    arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Of lm-eval: --model hf --model_args pretrained=DIR --tasks NAME, for example."""

    def run(self, console: Terminal) -> None:
        del console
        from globe.serve.harness import run_lm_eval

        run_lm_eval(self.arguments)


@dataclasses.dataclass(frozen=True)
class Serve:
    """Start the OpenAI-compatible server that is installed: vLLM or transformers."""

    folder: Folder
    """Folder that compress or export wrote; requests name it as their model, as it is given here."""
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Of the server, everything behind DIR: --port 8001, for example."""

    def run(self, console: Terminal) -> None:
        from globe.serve.server import find_server

        server = find_server(self.folder, self.arguments)
        if server.passed_over:
            console.print(f"note: {server.passed_over}", style="yellow", soft_wrap=True)
        console.print(f"{server.name} serves the model {self.folder}:", soft_wrap=True)
        console.print(shlex.join(server.command), soft_wrap=True)
        sys.stdout.flush()
        server.run()


@dataclasses.dataclass(frozen=True)
class Export:
    """Compose a compressed model back into a dense one, which any server loads."""

    model: Folder
    """Folder of a compressed model."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write. An export that was killed starts over when the same command is given again."""
    overwrite: bool = False
    """Replace an output that GloBE wrote earlier, when the new one is whole."""
    verify: bool = True
    """Compare the model's files with its manifest first."""

    def run(self, console: Terminal) -> None:
        from globe.checkpoint.reader import open_checkpoint
        from globe.run.export import export_dense

        export_dense(self.model, self.output, overwrite=self.overwrite, verify=self.verify)
        for note in open_checkpoint(self.model).side_files().left_out:
            console.print(f"note: {note}", style="yellow", soft_wrap=True)
        console.print(f"dense checkpoint in {self.output}; it needs no GloBE", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Imatrix:
    """Measure what llama-quantize needs: an importance matrix and tensors' types."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write. A run that was killed takes up its calibration when the same command is given again."""
    model: Model = "shipped"
    """Local folder or Hub id of the model that the GGUF file was converted from."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    cache_dir: Path | None = None
    """Folder that keeps a model of the Hub, in place of the usual cache."""
    bits: float = DEFAULT_BITS
    """Stored bits per weight of the experts, at most."""
    calibrate: str = CompressConfig.calibrate
    """Text on which the model is run, as for compress."""
    calibration_tokens: int = CompressConfig.calibration_tokens
    """Tokens of a given text at most."""
    statistics: str | None = None
    """File that `globe compress --save-statistics` wrote, in place of a text; the model is not run."""
    overwrite: bool = False
    """Replace an output that GloBE wrote earlier, when the new one is whole."""

    def run(self, console: Terminal) -> None:
        from globe.cli.progress import PlainProgress
        from globe.report.show import show_types
        from globe.run.imatrix import write_imatrix

        config = CompressConfig(
            bits=self.bits,
            calibrate=self.calibrate,
            calibration_tokens=self.calibration_tokens,
            statistics=self.statistics,
        )
        plan = write_imatrix(
            self.model,
            self.output,
            config,
            [PlainProgress(console)],
            overwrite=self.overwrite,
            revision=self.revision,
            cache=self.cache_dir,
        )
        show_types(console, plan, self.output)


@dataclasses.dataclass(frozen=True)
class Verify:
    """Prove that every byte of a folder is as GloBE's commands wrote it."""

    folder: Folder
    """Folder that compress, export or sweep wrote."""

    def run(self, console: Terminal) -> None:
        from globe.report.verification import show_verification

        show_verification(console, self.folder)


@dataclasses.dataclass(frozen=True)
class Push:
    """Upload what compress or export wrote to the Hugging Face Hub, verified first."""

    folder: Folder
    """Folder of a compressed model or a dense export."""
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO")]
    """Hub id, owner/name; the repository is made if it is not there."""
    private: bool = False
    """Let nobody else see a repository that is made."""
    revision: str | None = None
    """Branch, made if it is not there; by default the main one."""
    go_on: ClassVar[str] = "the same command goes on; what arrived is not sent twice"

    def run(self, console: Terminal) -> None:
        from globe.checkpoint.push import push

        address, *unlisted = push(self.folder, self.repo, private=self.private, revision=self.revision)
        if unlisted:
            console.print(f"not of the run, and not pushed: {', '.join(unlisted)}", style="yellow", soft_wrap=True)
        console.print(address, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show experts, what budgets give and what compressing takes, from headers alone."""

    model: Model = "shipped"
    """Local folder or Hub id, compressed or not."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""
    cache_dir: Path | None = None
    """Folder that keeps a model of the Hub, in place of the usual cache."""
    low_disk: bool = False
    """As compress has it."""
    plan: bool = False
    """Also run the model, which is downloaded first, and show how the budget is shared out."""
    config: Annotated[CompressConfig, tyro.conf.arg(name="")] = CompressConfig()

    def run(self, console: Terminal) -> None:
        from globe.report.inspection import show_inspection

        if self.plan and self.low_disk:
            raise SettingsError(
                "plan runs the model, and has no output to keep shards in: leave out one of plan, low_disk"
            )
        passing = Path() if self.low_disk else None  # where nothing is written, since nothing is read
        show_inspection(console, self.model, self.config, self.revision, self.cache_dir, passing, plan=self.plan)


@dataclasses.dataclass(frozen=True)
class ReportPage:
    """Write the record of a compressed model as one HTML page."""

    folder: Folder
    """Folder of a compressed model."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write; by default `report.html` in the folder."""

    def run(self, console: Terminal) -> None:
        from globe.report.page import write_report

        console.print(f"open {write_report(self.folder, self.output)} in a browser", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Env:
    """Show versions, devices and optional packages, for a bug report."""

    def run(self, console: Terminal) -> None:
        from globe.report.show import show_environment

        show_environment(console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0, 1 for a `GlobeError` or what the file system refuses, 70 for a fault of GloBE's own, 130 when interrupted (143 by
    SIGTERM, 129 by SIGHUP), 141 when nobody reads what is printed; wrong arguments leave with 2.
    """
    given = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    return with_ranks(functools.partial(_main, given, can_start_again=arguments is None))


def _main(given: Sequence[str], ranks: Ranks, *, can_start_again: bool) -> int:
    command, go_on = None, ""
    try:
        with stoppable():
            if ranks.is_follower:
                return ranks.serve()
            if given == ["--version"]:
                print(f"globe {__version__}", flush=True)
                return 0
            command = _parse(given)
            go_on = getattr(command, "go_on", "")
            tame_logging()
            if isinstance(command, Compress):
                if can_start_again and not command.low_disk and (size := gpus_for(command.config.device)) > 1:
                    print(f"starting again in {size} processes, one for each GPU; with --device cuda:0 it is one alone")
                    sys.stdout.flush()
                    return start_again(size, go_on)
                command.run(Terminal(), ranks)
            elif ranks.size == 1:
                command.run(Terminal())
            else:
                raise SettingsError(f"{given[0]} runs in one process: give it without torchrun, which is for compress")
            sys.stdout.flush()
    except FinishedError as error:
        tell("finished", str(error), "green")
    except GlobeError as error:
        tell("error", str(error))
        return FAILED
    except BrokenPipeError:
        return close_quietly()
    except OSError as error:
        tell("error", describe(error))
        return FAILED
    except KeyboardInterrupt as stop:
        return tell_stopped(stop, go_on)
    except Exception as error:  # the one place for what nobody foresaw
        if isinstance(command, LmEval):  # whose faults are not GloBE's to explain
            raise
        return tell_bug(error, given, go_on)
    return 0


def _parse(arguments: Sequence[str]) -> Any:
    match arguments:  # what is behind belongs to other programs
        case "lm-eval", *others:
            return LmEval(tuple(others))
        case "serve", folder, *others if not folder.startswith("-"):
            return Serve(Path(folder), tuple(others))
        case _:
            return _parsed_by_tyro(arguments)


def _parsed_by_tyro(arguments: Sequence[str]) -> Any:
    recipe, name = _from_recipe(arguments), "compress"
    return tyro.cli(
        Annotated[
            Compress, tyro.conf.subcommand(name) if recipe is None else tyro.conf.subcommand(name, default=recipe)
        ]
        | Annotated[Sweep, tyro.conf.subcommand("sweep")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[LmEval, tyro.conf.subcommand("lm-eval")]
        | Annotated[Serve, tyro.conf.subcommand("serve")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Imatrix, tyro.conf.subcommand("imatrix")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[Push, tyro.conf.subcommand("push")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[ReportPage, tyro.conf.subcommand("report")]
        | Annotated[Env, tyro.conf.subcommand("env")],
        prog="globe",
        description="Compress Mixture-of-Experts models to few bits. --version tells which this is.",
        args=_with_texts(arguments),
        registry=registry,
        config=(tyro.conf.DisallowNone,),
    )


def _from_recipe(arguments: Sequence[str]) -> Compress | None:
    """What a compression is, but for what is given, where a recipe says it."""
    given = [part for argument in arguments for part in argument.split("=", 1)]
    paths = [path for name, path in itertools.pairwise(given) if name == "--recipe"]
    if arguments[0] != "compress" or not paths:
        return None
    names = {name.removeprefix("--").replace("-", "_") for name in given if name.startswith("--")}
    recipe = read_recipe(paths[-1], BUDGET if names & {*BUDGET, "fit", "max_kl"} else ())
    return Compress(tyro.MISSING, recipe.model, revision=recipe.revision, config=recipe.config)


def _with_texts(arguments: Sequence[str]) -> list[str]:
    """A bare --calibrate stands for the shipped split."""
    given: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        given.append(argument)
        if argument == "--calibrate" and following.startswith("-"):
            given.append("calibration")
    return given


if __name__ == "__main__":
    sys.exit(main())
