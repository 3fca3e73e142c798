"""One pass over a model on a text, with a hook on every layer's experts, for the statistics of a calibrated fit."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from globe.bank_shape import ExpertSizes
from globe.checkpoint.header import TensorInfo
from globe.checkpoint.tensor_files import save_each
from globe.errors import CheckpointError
from globe.experts.metric import LayerStatistics
from globe.machine.memory import explained_exhaustion
from globe.measure.evaluate import read_windows
from globe.measure.settings import EvaluateConfig
from globe.measure.tokenizers import check_vocabulary
from globe.model.expert_modules import RoutedExperts, find_experts
from globe.model.expert_run import ExpertRun, routed_tokens, run_expert, run_experts
from globe.model.loading import OUT_OF_MEMORY
from globe.terms import FAMILIES, Family

MOST_ENERGY = 16.0
"""Of a token within an expert, over the median one's, to the second moment."""


class LayerSums:
    """Sums over the tokens of one layer, on the device of its experts."""

    def __init__(self, experts: RoutedExperts, *, inner: bool) -> None:
        layout = experts.layout
        E, P, D = layout.num_experts, layout.intermediate_size, layout.hidden_size

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=experts.device)

        self._experts, self._num_tokens = experts, 0
        self._inputs, self._counts = zeros(D, D), zeros(E)
        self._inner = zeros(E, P, P) if inner else None
        self._rows: dict[Family, Tensor] = {family: zeros(E, P) for family in FAMILIES}

    def run(self, *arguments: Tensor) -> Tensor:
        """Add what the experts module is called with; returns what its forward does."""
        self._add_inputs(arguments)
        return run_experts(self._experts, arguments, self._add)

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        """The same as a forward pre-hook of the module, which runs its experts once more."""
        x, chosen, weights = self._add_inputs(arguments)
        for expert in range(self._experts.layout.num_experts):
            token, place = torch.where(chosen == expert)
            if len(token):
                self._add(expert, x[token], weights[token, place], run_expert(self._experts, expert, x[token]))

    def _add_inputs(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        x, chosen, weights = routed_tokens(self._experts.layout, arguments)
        self._num_tokens += x.shape[0]
        self._inputs.addmm_(x.float().mT, x.float())
        return x, chosen, weights

    def _add(self, expert: int, x: Tensor, router_weights: Tensor, run: ExpertRun) -> None:
        router_weights, energy = router_weights.float(), run.down.square().sum(1)
        self._counts[expert] += len(x)
        self._rows["gate"][expert] += energy * (router_weights.square() @ run.by_gate.square())
        self._rows["up"][expert] += energy * (router_weights.square() @ run.by_up.square())
        self._rows["down"][expert] += router_weights.square() @ run.activations.square()
        if self._inner is not None:
            weighted = _capped(router_weights[:, None] * run.activations)
            self._inner[expert].addmm_(weighted.mT, weighted)

    def statistics(self) -> LayerStatistics:
        """Of all tokens so far; `CheckpointError` naming the layer where they are not finite."""
        rows: dict[Family, Tensor] = {family: self._rows[family].cpu() for family in FAMILIES}
        inputs = self._inputs / self._num_tokens
        if not all(bool(tensor.isfinite().all()) for tensor in (inputs, *rows.values())):
            raise CheckpointError(
                f"the experts of layer {self._experts.layer} compute with NaN or infinite values on the calibration "
                "text: mend the model's weights, or compress them alone with --calibrate none --allocation uniform"
            )
        inner = None if self._inner is None else self._inner.cpu()
        return LayerStatistics(self._num_tokens, inputs.cpu(), self._counts.cpu(), rows, inner)


def _capped(tokens: Tensor) -> Tensor:
    """Tokens (T, N), none with more than `MOST_ENERGY` times the energy of the median one.

    Where a model has massive activations, those of the first token are a thousand times all others, and that token
    hardly minds errors; a second moment of which it is nearly all says nothing of the others.
    """
    energies = tokens.square().sum(1, keepdim=True)
    most = MOST_ENERGY * energies.median()
    return torch.where(energies > most, tokens * (most / energies).sqrt(), tokens)


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """What a model is calibrated on."""

    name: str
    """A shipped split, a file or a data set."""
    windows: Tensor
    """Token windows (N, length)."""

    @property
    def fingerprint(self) -> str:
        """Of the tokens."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()


def read_calibration_text(folder: Path, name: str, max_tokens: int, trust_remote_code: bool = False) -> CalibrationText:
    """At most `max_tokens` tokens, but one window, from the beginning of a shipped split or a text file.

    Raises `SettingsError` when the text is missing, none or shorter than a window, `CheckpointError` when the model in
    `folder` has no tokenizer, or one whose code would have to be run.
    """
    config = EvaluateConfig(text=name, max_tokens=max_tokens, trust_remote_code=trust_remote_code)
    windows, _ = read_windows(folder, config)
    return CalibrationText(name, windows[: max(1, max_tokens // config.length)])


@torch.no_grad()
def calibrate(
    model: Any, windows: Tensor, layers: Collection[int], batch: int = 8, *, inner: bool = False
) -> dict[int, LayerStatistics]:
    """Run a causal language model over token windows (N, length) and collect the statistics of `layers`.

    Beside the model, D² + 3·E·P numbers for each layer are kept, however long the text, and with `inner` E·P² more.
    Raises `UnsupportedModelError` as `find_experts` does, and `CheckpointError` for tokens that the model does not
    know, and naming the layer whose statistics are not finite.
    """
    check_vocabulary(windows, model, "the model")
    with explained_exhaustion(f"calibrating on {model.device}", OUT_OF_MEMORY):
        sums = {
            experts.layer: LayerSums(experts, inner=inner) for experts in find_experts(model) if experts.layer in layers
        }
        run_hooked(model, windows, sums, batch)
    return {layer: total.statistics() for layer, total in sums.items()}


def run_hooked(model: Any, windows: Tensor, hooks: Mapping[int, Callable[..., None]], batch: int) -> None:
    """Run a model over token windows with a forward pre-hook on the experts module of each layer in `hooks`."""
    handles = [
        experts.module.register_forward_pre_hook(hooks[experts.layer])
        for experts in find_experts(model)
        if experts.layer in hooks
    ]
    try:
        for ids in windows.split(batch):
            model(input_ids=ids.to(model.device))
    finally:
        for handle in handles:
            handle.remove()


def save_statistics(
    path: Path,
    sizes: Mapping[int, ExpertSizes],
    layers: Iterable[tuple[int, LayerStatistics]],
    *,
    inner: bool,
) -> str:
    """Write the statistics of the layers in `sizes`, as they come, in this order, to a safetensors file.

    Returns its SHA-256. Raises `OutputError` when the disk is full.
    """
    infos = layer_infos(path.name, sizes, inner=inner)
    return save_each(path, infos, (tensor for _, statistics in layers for tensor in layer_tensors(statistics)))


def layer_infos(file: str, sizes: Mapping[int, ExpertSizes], *, inner: bool) -> list[TensorInfo]:
    """What a file has of the statistics of layers, in order."""
    infos: list[TensorInfo] = []
    for layer, each in sizes.items():
        E, P, D = each.num_experts, each.intermediate_size, each.hidden_size
        shapes = {"num_tokens": (), "inputs": (D, D), "counts": (E,), **({"inner": (E, P, P)} if inner else {})}
        for name, shape in {**shapes, **{f"rows.{family}": (E, P) for family in FAMILIES}}.items():
            infos.append(TensorInfo(f"{layer}.{name}", "F32", shape, file, 0, 4 * math.prod(shape)))
    return infos


def layer_tensors(statistics: LayerStatistics) -> Iterator[Tensor]:
    """The tensors of one layer, in the order of `layer_infos`."""
    yield torch.tensor(float(statistics.num_tokens))
    yield statistics.inputs
    yield statistics.counts
    if statistics.inner is not None:
        yield statistics.inner
    yield from (statistics.rows[family] for family in FAMILIES)


class StoredStatistics(Mapping[int, LayerStatistics]):
    """What `save_statistics` wrote, whatever else the file holds; a layer is read when it is asked for, not kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as file:
            self._names = frozenset(file.keys())
        numbers = {name.partition(".")[0] for name in self._names}
        self._layers = sorted(int(number) for number in numbers if number.isdigit())

    def __getitem__(self, layer: int) -> LayerStatistics:
        if layer not in self._layers:
            raise KeyError(layer)
        with safe_open(self.path, framework="pt") as file:
            return LayerStatistics(
                int(file.get_tensor(f"{layer}.num_tokens")),
                file.get_tensor(f"{layer}.inputs"),
                file.get_tensor(f"{layer}.counts"),
                {family: file.get_tensor(f"{layer}.rows.{family}") for family in FAMILIES},
                file.get_tensor(inner) if (inner := f"{layer}.inner") in self._names else None,
            )

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
