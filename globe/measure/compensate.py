"""What the layers coded so far have changed in the hidden states, made up for in the layers to come.

The original and what is coded of it are run side by side on the calibration's tokens, a layer at a time. At a layer, Δ
is the difference of their outputs, errors of all earlier layers and of this one's gate and up together. Expert e adds
p h_e W_e to the output, p being the router's weight and h_e its inner units in the coded model, so a change of its
down_proj makes up for some of Δ: ridge regression, expert after expert,

    dW_e = argmin Σ_t ‖Δ_t − p_t h_te dW_e‖² + λ ‖dW_e‖²,    Δ_t ← Δ_t − p_t h_te dW_e

and then a part of dW_e as large as serves tokens that it was not fitted to: those of every other window by the dW_e of
the windows between, and the other way round. The layer is coded with it, and both models go on. Taking account of
earlier errors in the layers to come is known from GPTAQ (Li et al. 2025, arXiv 2504.02692) and QEP (Arai and Ichikawa
2025, arXiv 2504.09629), which change what a matrix is to do with its perturbed inputs; here it is the residual stream
that is mended.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from globe.bank.linalg import solve_positive
from globe.checkpoint.dtypes import TORCH_DTYPES
from globe.experts.on_disk import Stack, empty_stack
from globe.machine.memory import explained_exhaustion
from globe.model.expert_modules import RoutedExperts
from globe.model.expert_run import inner_units, routed_tokens, token_numbers
from globe.model.loading import OUT_OF_MEMORY
from globe.model.streamed import Passage, StoredExperts, StreamedModel
from globe.terms import Family

RIDGE = 0.01
"""λ, over the mean diagonal of the regression's second moment."""
MOST_ENERGY = 16.0
"""Of a token's Δ, over the median one's: no token counts for more."""
_TOLERANCE = 1e-2
"""Of what an addition to the experts' output makes of the layer's: how far that may be from a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Correction:
    """What a layer's experts can do about the errors of those before them."""

    down: Stack
    """dW (E, P, D), in the source's dtype, to be added to down before it is coded."""
    share: float
    """Of the squared difference in the layer's output, what that makes up for on the tokens that it was fitted to."""


class Compensation:
    """The original's and the coded model's hidden states, on their way through the layers."""

    def __init__(self, model: StreamedModel, windows: Tensor, batch: int = 8, scratch: Path | None = None) -> None:
        """On token windows (N, length), so many at a time; what is large of a layer waits in the folder `scratch`.

        Raises as `StreamedModel.enter` does.
        """
        self._model, self._next, self.scratch = model, 0, scratch
        with torch.no_grad(), explained_exhaustion(f"running the model on {model.device}", OUT_OF_MEMORY):
            self._original = model.enter(windows, batch)
            model.let_go()
        self._coded = dataclasses.replace(self._original, hidden=[*self._original.hidden])
        self._is_odd = (torch.arange(len(windows)) % 2 == 1).repeat_interleave(windows.shape[1])

    @torch.no_grad()
    def correction(self, index: int, coded: Mapping[Family, Stack]) -> Correction | None:
        """What to add to a layer's down, with the families (E, P, D) that are coded already.

        None where what is added to the experts' output is not added to the layer's, as where a norm follows, and where
        there are infinite numbers. Layers in order; `go_through` comes after it.
        """
        experts = self._reach(index)
        with self._layer(index) as layer:
            self._original.through(index, layer)
            experts.instead.update(coded)
            seen, here = _Seen(experts), dataclasses.replace(self._coded, hidden=[*self._coded.hidden])
            with experts.module.register_forward_pre_hook(seen):
                here.through(index, layer)
            if (scale := self._scale(index, layer, experts, here.hidden[0])) is None:
                return None
            pairs = zip(self._original.hidden, here.hidden, strict=True)
            missing = torch.cat([(original - coded).flatten(0, 1) for original, coded in pairs]) / scale
            return _fit(experts, seen, missing, self._is_odd, self.scratch) if bool(missing.isfinite().all()) else None

    @torch.no_grad()
    def go_through(self, index: int, coded: Mapping[Family, Stack]) -> None:
        """Have both models go through a layer, the coded one with the families (E, P, D) that are coded in it."""
        is_new = index >= self._next  # no correction was asked for
        experts = self._reach(index)
        with self._layer(index) as layer:
            if is_new:
                self._original.through(index, layer)
            experts.instead.update(coded)
            self._coded.through(index, layer)

    def _reach(self, index: int) -> StoredExperts:
        """Go through the layers before, which are not coded; returns the layer's experts."""
        for between in range(self._next, index):
            with self._layer(between) as layer:
                self._original.through(between, layer)
                self._coded.through(between, layer)
        self._next = index + 1
        return self._model.experts[index]

    @contextlib.contextmanager
    def _layer(self, index: int) -> Iterator[nn.Module]:
        exhausted = explained_exhaustion(f"running the model on {self._model.device}", OUT_OF_MEMORY)
        with exhausted, self._model.layer(index) as layer:
            yield layer

    def _scale(self, index: int, layer: nn.Module, experts: RoutedExperts, before: Tensor) -> float | None:
        """By what an addition to the experts' output is multiplied in the layer's, `before` on the first windows; None
        where it is something else."""
        if before.dim() != 3:
            return None
        generator = torch.Generator(before.device).manual_seed(0)
        noise = torch.randn(before.flatten(0, 1).shape, generator=generator, device=before.device)
        noise *= before.square().mean().sqrt()

        def add(_module: Any, _arguments: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed.view(-1, noise.shape[1])[: len(noise)] += noise  # of its first expert, where each has its own
            return changed

        alone = Passage(self._coded.hidden[:1], self._coded.others[:1])
        with experts.module.register_forward_hook(add):
            alone.through(index, layer)
        change = (alone.hidden[0] - before).flatten(0, 1)
        scale = float((change * noise).sum() / noise.square().sum())
        is_multiple = float((change - scale * noise).norm()) <= _TOLERANCE * float(change.norm())
        return scale if scale and is_multiple else None


class _Seen:
    """What a layer's experts were called with, over all windows: a forward pre-hook of them."""

    def __init__(self, experts: RoutedExperts) -> None:
        self._layout, self._num_tokens = experts.layout, 0
        self._calls = list[tuple[Tensor, Tensor, Tensor, Tensor]]()

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        x, chosen, weights = routed_tokens(self._layout, arguments)
        self._calls.append((self._num_tokens + token_numbers(self._layout, arguments), x, chosen, weights))
        self._num_tokens += len(arguments[0]) // (self._layout.num_experts if self._layout.presorted else 1)

    def of(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that are routed to an expert: their numbers (T,), inputs (T, D) and router weights (T, 1)."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for token, x, chosen, weights in self._calls:
            row, place = torch.where(chosen == expert)
            found.append((token[row], x[row], weights[row, place, None]))
        numbers, inputs, router_weights = map(torch.cat, zip(*found, strict=True))
        return numbers, inputs, router_weights


def _fit(experts: StoredExperts, seen: _Seen, missing: Tensor, is_odd: Tensor, scratch: Path | None) -> Correction:
    """The corrections of all experts, which make up for some of what is missing (T, D)."""
    layout = experts.layout
    energies = missing.square().sum(1, keepdim=True)
    counted = (
        (MOST_ENERGY * energies.median() / energies.clamp_min(torch.finfo(energies.dtype).tiny)).clamp(max=1).sqrt()
    )
    shape = layout.num_experts, layout.intermediate_size, layout.hidden_size
    found = empty_stack(shape, TORCH_DTYPES[experts.stored.dtype], scratch)
    for expert in range(layout.num_experts):
        token, x, router_weights = seen.of(expert)
        units = router_weights * inner_units(experts, expert, x)
        change = shrunk(counted[token] * units, counted[token] * missing[token], is_odd[token.cpu()])
        found[expert] = change
        missing[token] -= units @ change
    before, after = float((counted.square() * energies).sum()), float((counted * missing).square().sum())
    return Correction(found, 1 - after / before if before > 0 else 0.0)


def shrunk(inputs: Tensor, outputs: Tensor, is_odd: Tensor) -> Tensor:
    """Coefficients (N, K) from inputs (T, N) to outputs (T, K), as large as those of one half of the tokens serve the
    other; 0 where they do not."""
    ridge = RIDGE * float(inputs.square().sum()) / inputs.shape[1]
    if not ridge > 0:
        return inputs.new_zeros(inputs.shape[1], outputs.shape[1])
    gained = energy = 0.0
    for half, other in ((is_odd, ~is_odd), (~is_odd, is_odd)):
        foretold = inputs[other] @ _regression(inputs[half], outputs[half], ridge / 2)
        gained += float((foretold * outputs[other]).sum())
        energy += float(foretold.square().sum())
    part = min(max(gained / energy, 0.0), 1.0) if energy > 0 else 0.0
    return part * _regression(inputs, outputs, ridge)


def _regression(inputs: Tensor, outputs: Tensor, ridge: float) -> Tensor:
    """argmin ‖outputs − inputs W‖² + ridge ‖W‖², W (N, K): by the second moment of N inputs or, where tokens are
    fewer, by the products of these with each other."""
    is_few = len(inputs) < inputs.shape[1]
    gram = inputs @ inputs.mT if is_few else inputs.mT @ inputs
    gram.diagonal().add_(ridge)
    wanted = outputs if is_few else inputs.mT @ outputs
    solved, _ = solve_positive(gram, wanted, 0.0)
    return inputs.mT @ solved if is_few else solved
