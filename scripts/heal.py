#!/usr/bin/env python3
"""Heal a compressed model: train its factors, and nothing else, to predict as the original does.

    globe compress -o runs/half --keep 0.5
    python scripts/heal.py runs/half -o runs/healed
    globe evaluate runs/healed --reference shipped

Distillation with transformers' Trainer: KL(original ‖ compressed), averaged over the tokens of a text, in float32. The
output is the input's files with other factors, rounded to the dtypes that they had: it loads, evaluates and exports as
the input does. Factors in few bits cannot be trained.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.checkpoint.evaluation import EVALUATION
from globe.checkpoint.manifest import MANIFEST
from globe.checkpoint.reader import INDEX, Checkpoint, open_checkpoint
from globe.checkpoint.report import REPORT
from globe.checkpoint.shipped import resolve_model
from globe.checkpoint.side_files import CONFIG
from globe.checkpoint.tensor_files import save_tensors
from globe.checkpoint.writer import copy_side_files, write_index, write_json
from globe.errors import SettingsError
from globe.measure.evaluate import read_windows
from globe.measure.reference import source_reference
from globe.measure.settings import EvaluateConfig
from globe.model.autoload import AUTOLOAD, write_autoload
from globe.model.factor_check import RUN_METADATA
from globe.model.loading import load
from globe.model.names import is_factor
from globe.model.quantizer import GlobeQuantizer
from globe.run.folder import open_run


@dataclasses.dataclass(frozen=True)
class Heal:
    """Train the factors of a compressed model to predict as the original does."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the compressed model."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write."""
    teacher: str | None = None
    """Original model; by default the one that the compressed model came from."""
    text: str = str(Path(__file__).parents[1] / "benchmarks" / "python_library.txt")
    """Text to learn on: a shipped split or a file."""
    max_tokens: int = 262144
    """Tokens of the text at most; that text has fewer."""
    length: int = 256
    """Tokens in a window."""
    batch: int = 4
    """Windows in a step."""
    steps: int = 175
    """Steps of the optimiser."""
    learning_rate: float = 1e-3
    """Of Adam at its peak, in units of each factor's root mean square; it rises for a tenth of the steps and then falls
    as a cosine."""
    seed: int = 0
    """Of the order of the windows."""


class Windows(Dataset[dict[str, Tensor]]):
    """Token windows (N, length), one for each example."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index]}


class Distillation(Trainer):
    """Trainer whose loss is the mean KL(teacher ‖ model) per token, in nats."""

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            target = self.teacher(**inputs).logits.float().log_softmax(-1)
        found = model(**inputs).logits.float().log_softmax(-1)
        return functional.kl_div(found, target, reduction="sum", log_target=True) / inputs["input_ids"].numel()


def heal(config: Heal) -> None:
    """Raises `GlobeError` for a model that is not compressed, or whose factors are in few bits, before any training."""
    checkpoint = open_checkpoint(config.model)
    settings = {name: str(value) for name, value in dataclasses.asdict(config).items() if name != "output"}
    run = {"command": "heal", **settings, "fingerprint": checkpoint.fingerprint()}
    with open_run(config.output, run) as folder:
        if not folder.whole():
            folder.complete(write_with_factors(checkpoint, train(config), folder.path, folder.records.identity))
        folder.publish()
    print(f"healed model in {config.output}")


def train(config: Heal) -> dict[str, Tensor]:
    """The healed factors, by name."""
    source = _teacher(config)
    reading = EvaluateConfig(config.text, config.max_tokens, config.length)
    windows, _ = read_windows(config.model, reading)
    # steps are smaller than what bfloat16 can tell apart
    student: Any = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    quantizer = getattr(student, "hf_quantizer", None)
    if not isinstance(quantizer, GlobeQuantizer) or not quantizer.is_qat_trainable:
        raise SettingsError(
            f"{config.model} has no factors that can be trained; give an output of `globe compress` without --bits"
        )
    factors: dict[str, Tensor] = {name: p for name, p in student.named_parameters() if is_factor(name)}
    student.requires_grad_(False)
    for factor in factors.values():
        factor.requires_grad_()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch,
            warmup_steps=config.steps // 10,
            lr_scheduler_type="cosine",
            seed=config.seed,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        )
        teacher = load(source).float().to(arguments.device)
        optimizers = relative_adam(factors.values(), config.learning_rate), None  # Trainer makes the schedule
        data = Windows(windows)
        Distillation(student, arguments, train_dataset=data, teacher=teacher, optimizers=optimizers).train()
    return factors


def _teacher(config: Heal) -> str | Path:
    """The model named, or the one of the report, if it is at hand and the same as it was."""
    if config.teacher is not None:
        return resolve_model(config.teacher)
    reference = source_reference(config.model)
    if reference is None:
        raise SettingsError(f"{config.model} has no {REPORT} that names its source: give --teacher")
    return reference.model


def relative_adam(tensors: Iterable[Tensor], step: float) -> torch.optim.Adam:
    """Adam with steps in units of each tensor's root mean square: bases have a hundred times that of adapters."""
    return torch.optim.Adam([{"params": [t], "lr": step * float(t.detach().square().mean().sqrt())} for t in tensors])


def write_with_factors(checkpoint: Checkpoint, factors: Mapping[str, Tensor], folder: Path, run: str) -> dict[str, str]:
    """Write a compressed checkpoint again, with these factors, by name, for its own; returns the files' SHA-256."""
    files: dict[str, str] = {}
    for shard in checkpoint.shards:
        stored = {tensor.name: tensor for tensor in checkpoint.shard_tensors(shard)}
        tensors = dict(checkpoint.read_many(stored.keys() - factors.keys()))
        healed = {name: factors[name].to(TORCH_DTYPES[stored[name].dtype]) for name in stored.keys() & factors.keys()}
        content = {name: (tensors | healed)[name] for name in stored}
        files[shard] = save_tensors(folder / shard, content, {RUN_METADATA: run})
    weight_map = {tensor.name: tensor.shard for tensor in checkpoint.tensors.values()}
    files[INDEX] = write_index(folder, weight_map, sum(tensor.nbytes for tensor in checkpoint.tensors.values()))
    # the report's errors are those of the fit
    files |= copy_side_files(checkpoint, folder, leave_out=(REPORT, MANIFEST, EVALUATION))
    section = {**checkpoint.config["quantization_config"], "run": run}
    files[CONFIG] = write_json(folder / CONFIG, {**checkpoint.config, "quantization_config": section})
    files[AUTOLOAD] = write_autoload(folder)
    return files


if __name__ == "__main__":
    heal(tyro.cli(Heal, description=__doc__))
