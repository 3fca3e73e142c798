"""How long a compression takes here: each of its parts is done for a moment on random matrices of the model's sizes.

Measuring runs experts one by one, on the tokens that come to each, and the rest of the model in large products; coding
goes through the inputs of all experts of a layer at once. What a call takes is timed, and multiplied by the calls.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from globe.bank_shape import sides
from globe.checkpoint.layout import ExpertLayer
from globe.experts.coding import CodingProblem
from globe.machine.device import multiply_add_rate
from globe.measure.calibrate import LayerSums
from globe.measure.runnable import Place
from globe.measure.samples import LENGTH, NUM_SAMPLES
from globe.measure.sensitivity import NUM_WINDOWS, WINDOW, Sensitivities, adding_squares
from globe.measure.settings import EvaluateConfig
from globe.model.expert_modules import ExpertsLayout, RoutedExperts
from globe.model.experts import usual_gate
from globe.model.loading import experts_per_token, read_config, text_config
from globe.plan.budget import Bits
from globe.quant.feedback import BLOCK, order_inputs
from globe.quant.water_fill import water_fill
from globe.run.coding import MOST_WINDOWS, wants_sensitivities
from globe.run.job import Outline
from globe.terms import FAMILIES, Family

_BATCH = 8
"""Windows that are run at once to calibrate."""
_FEW = 8
"""Experts of a layer that are run, with as many tokens each as they have among all."""
_OPERATIONS = 1000
"""Small ones for each layer of a forward pass, beside its products; measured, see docs/log.md."""
_TRIED = 4, 16
"""Experts that are coded to see what each of them, and what a call by itself, takes."""
_READ = 4
"""Times that the experts of a layer are read and looked at, three to plan and one to code."""
_TRIALS = 3


def measuring_seconds(outline: Outline, place: Place) -> float:
    """Of running the model for what it says of its experts; 0 where it is not run."""
    if place.device is None:
        return 0.0
    config, layers = outline.config, [outline.layers[index] for scope in outline.scopes for index in scope.layers]
    windows, length, seconds = NUM_WINDOWS, WINDOW, 0.0
    rest = _multiply_adds_beside(outline) / multiply_add_rate(place.device)
    call, experts = _call_seconds(outline, place.device), _ExpertTimes(outline, place.device)
    if config.calibrate != "none":
        samples = config.calibrate == "samples" and not place.is_streamed
        length = LENGTH if samples else EvaluateConfig.length
        windows = NUM_SAMPLES if samples else max(1, config.calibration_tokens // length)
        if samples:
            seconds += LENGTH * (call + NUM_SAMPLES * rest + sum(experts.run(layer, NUM_SAMPLES) for layer in layers))
        batch = min(_BATCH, windows) * length
        seconds += windows * length * rest
        seconds += windows * length / batch * (call + sum(experts.calibrate(layer, batch) for layer in layers))
    if wants_sensitivities(config):
        seen = math.ceil(windows / math.ceil(windows / MOST_WINDOWS))
        seconds += seen * (3 * call + 3 * length * rest + sum(experts.sensitivities(layer, length) for layer in layers))
    return seconds


def working_seconds(outline: Outline) -> float:
    """Of planning and coding, or of fitting."""
    config = outline.config
    if not isinstance(config.budget, Bits):
        steps = sum(bank.shape.step_multiply_adds for scope in outline.scopes for bank in scope.banks)
        return config.steps * steps / multiply_add_rate(config.device)
    times = functools.cache(functools.partial(_coding_time, config.budget, multiply_add_rate("cpu")))
    matrices = ((outline.layers[index], family) for index, family in outline.compressed())
    return sum(times(layer.num_experts, *sides(layer, family), family) for layer, family in matrices)


def _multiply_adds_beside(outline: Outline) -> int:
    """Of a token, in all matrices but the experts'."""
    text = text_config(read_config(outline.checkpoint))
    matrices = sum(math.prod(each.shape) for each in outline.checkpoint.tensors.values() if len(each.shape) > 1)
    experts = sum(each.num_experts * each.intermediate_size * each.hidden_size for each in outline.layers.values())
    looked_up = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    return max(0, matrices - looked_up - len(FAMILIES) * experts)


def _call_seconds(outline: Outline, device: str) -> float:
    """Of what is no product in a forward pass over a few tokens."""
    text = text_config(read_config(outline.checkpoint))
    x = torch.randn(NUM_SAMPLES, text.hidden_size, device=device)
    return _OPERATIONS * len(outline.layers) * _seconds(lambda: [x * x for _ in range(_OPERATIONS)]) / _OPERATIONS


class _ExpertTimes:
    """Seconds that all experts of a layer take on so many tokens, routed at random."""

    def __init__(self, outline: Outline, device: str) -> None:
        self._device = device
        self._routed = experts_per_token(outline.checkpoint) or 1
        self._inner = outline.config.is_coded
        self._timed = functools.cache(self._time)

    def run(self, layer: ExpertLayer, tokens: int) -> float:
        """To be run."""
        return self._all(_run, layer, tokens)

    def calibrate(self, layer: ExpertLayer, tokens: int) -> float:
        """To be run, and what is summed over the tokens."""
        return self.run(layer, tokens) + self._all(_sum if self._inner else _sum_rows, layer, tokens)

    def sensitivities(self, layer: ExpertLayer, tokens: int) -> float:
        """To be run forward and backward, and what is summed over gradients."""
        return self._all(_differentiate, layer, tokens)

    def _all(self, work: _Work, layer: ExpertLayer, tokens: int) -> float:
        E, P, D = layer.num_experts, layer.intermediate_size, layer.hidden_size
        return E / min(E, _FEW) * self._timed(work, E, P, D, tokens)

    def _time(self, work: _Work, E: int, P: int, D: int, tokens: int) -> float:
        few = min(E, _FEW)
        module = _Experts(few, P, D).to(self._device)
        x = torch.randn(tokens, D, device=self._device)
        chosen = torch.rand(tokens, E, device=self._device).argsort(1)[:, : self._routed]
        experts = RoutedExperts(0, "", module, ExpertsLayout(few, P, D, False, True, False))
        return _seconds(lambda: work(experts, (x, chosen, torch.ones_like(chosen, dtype=x.dtype))))


_Work = Callable[[RoutedExperts, tuple[Tensor, Tensor, Tensor]], None]


@torch.no_grad()
def _run(experts: RoutedExperts, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    experts.module(*arguments)


@torch.no_grad()
def _sum(experts: RoutedExperts, arguments: tuple[Tensor, Tensor, Tensor], *, inner: bool = True) -> None:
    LayerSums(experts, inner=inner)(experts.module, arguments)


_sum_rows = functools.partial(_sum, inner=False)


@torch.enable_grad()
def _differentiate(experts: RoutedExperts, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    found: Sensitivities = {}
    x, chosen, weights = arguments
    with adding_squares(experts, found):
        experts.module(x.detach().requires_grad_(), chosen, weights).sum().backward()


class _Experts(nn.Module):
    """Experts as transformers keeps them, which run one by one."""

    def __init__(self, E: int, P: int, D: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * P, D) / D**0.5, requires_grad=False)
        self.down_proj = nn.Parameter(torch.randn(E, D, P) / P**0.5, requires_grad=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            token, place = torch.where(chosen == expert)
            outputs = usual_gate(self, x[token] @ gate_up.mT) @ down.mT
            found.index_add_(0, token, weights[token, place, None] * outputs)
        return found


def _coding_time(budget: Bits, rate: float, E: int, N: int, K: int, family: Family) -> float:
    """Seconds of planning and coding E experts with N inputs and K outputs."""
    few, many = _TRIED
    inputs = min(N, BLOCK)
    of_few, of_many = (_seconds(functools.partial(_code, budget, experts, inputs, K)) for experts in _TRIED)
    of_each = max(0.0, of_many - of_few) / (many - few)
    by_call = max(0.0, of_few - few * of_each)
    products = 2 * E * N * N * K  # feedback, twice half of them, and the experts' inner products
    orders = _READ * (E if family == "down" else 1) * N**3 * 4 / 3  # two factorisations in float64
    return N / inputs * (by_call + E * of_each) + (products + orders) / rate


def _code(budget: Bits, E: int, N: int, K: int) -> None:
    """Plan and code normal experts."""
    generator = torch.Generator().manual_seed(0)
    X, C = torch.randn(E, N, K, generator=generator), torch.eye(N)
    problem = CodingProblem(X, order_inputs(C[None]), torch.ones(E, K), C, float(N))
    multiplier = water_fill([problem.rows()], budget.num_bytes(X.numel())).multiplier
    problem.bank(multiplier)
    for _ in range(_READ - 2):
        dataclasses.replace(problem).rows()
    expected = dataclasses.replace(problem).rehearsed(multiplier)
    expected.rows()
    dataclasses.replace(problem).rehearsed(multiplier).code(multiplier)


def _seconds(work: Callable[[], Any]) -> float:
    """That the work takes: the least of three, the first of which may have to load or compile something."""
    found: list[float] = []
    for _ in range(_TRIALS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)
