"""How long a compression takes here: each of its parts is done for a moment on random matrices of the model's sizes.

Measuring runs experts one by one, on the tokens that come to each, and the rest of the model in large products; coding
goes through the inputs of all experts of a layer at once. What a call takes is timed, and multiplied by the calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from globe.bank.objective import InputMetric
from globe.bank_shape import BankShape, sides
from globe.checkpoint.layout import ExpertLayer
from globe.experts.coding import CodingProblem, Rehearsed
from globe.experts.family import telling_step
from globe.machine.device import multiply_add_rate
from globe.measure.calibrate import LayerSums
from globe.measure.compensate import shrunk
from globe.measure.runnable import Place
from globe.measure.runs import MOST_WINDOWS, is_compensated, is_sampled, wants_sensitivities, windows_seen
from globe.measure.samples import NUM_SAMPLES
from globe.measure.sensitivity import adding_squares
from globe.model.configuration import experts_per_token, read_config, text_config
from globe.model.expert_modules import ExpertsLayout, RoutedExperts
from globe.model.expert_run import run_experts
from globe.model.experts import usual_gate
from globe.plan.budget import Bits
from globe.quant.feedback import order_inputs
from globe.quant.outputs import fit_outputs, rotate
from globe.quant.sizes import MOST_WEIGHTS
from globe.quant.threads import split
from globe.quant.water_fill import water_fill
from globe.run.outline import PLANNING_PASSES, Outline
from globe.terms import FAMILIES
from globe.train.config import FitConfig
from globe.train.fit_banks import fit_bank

_BATCH = 8
"""Windows that are run at once to calibrate."""
_FEW, _MOST_WEIGHTS = 8, 1 << 25
"""Experts of a layer that are run, with as many tokens each as they have among all, and what they may have together."""
_OPERATIONS = 1000
"""Small ones for each layer of a forward pass, beside its products; measured, see docs/log.md."""
_CODED, _SPREAD = 1 << 21, 0.6
"""Weights that are coded to see how long it takes, a few inputs of all experts, and octaves by which rows differ in
size, from input to input and from expert to expert; see docs/log.md."""
_ROUNDING = 5_000
"""Multiply-adds of large products in the time that rounding a weight for others' kernels takes, or twice as many where
experts are narrow; measured, see docs/log.md."""
_FITTED, _LEAST_FITTED, _EXPERT = 1 << 20, 3, 1 << 18
"""Weights that are fitted to see how long it takes, of so many experts at least, and of each of them at most."""
_FEW_STEPS, _STEPS = 2, 4
"""Of their warm start, and steps that are timed."""
_READ = PLANNING_PASSES + 1
"""Times that the experts of a layer are read and looked at, to plan and to code."""
_TRIALS, _MOST_TRIALS, _PATIENCE = 2, 10, 0.1


@dataclasses.dataclass(frozen=True)
class Foreseen:
    """Seconds that a compression will take."""

    measuring: float
    """The model, by running it."""
    working: float
    """Of planning and coding or of fitting, by all processes, with what layers make up for."""


def foresee(outline: Outline, place: Place, processes: int = 1, is_shared: bool = False) -> Foreseen:
    """How long it takes to measure the model, which can be run at that place, by all processes where that `is_shared`,
    and to plan, code or fit its experts."""
    with torch.random.fork_rng(devices=[]):
        measuring, working = 0.0, _working_seconds(outline) / processes
        if place.device is not None:
            run = _Run(outline, place)
            if outline.config.statistics is None:
                measuring = run.samples() + run.calibration() + run.sensitivities()
                measuring /= processes if is_shared else 1
            working += run.compensation()
    return Foreseen(measuring, working)


def _working_seconds(outline: Outline) -> float:
    """Of planning and coding, or of fitting."""
    config = outline.config
    if config.is_packed:
        return _ROUNDING * outline.original_parameters() / multiply_add_rate(config.device)
    if not isinstance(config.budget, Bits):
        shapes = [bank.shape for scope in outline.scopes for bank in scope.banks]
        return sum(_fitting_time(config.fit_config(shape), shape, config.calibrate != "none") for shape in shapes)
    times = functools.partial(_coding_time, config.budget, multiply_add_rate("cpu"))
    layers = [outline.layers[index] for scope in outline.scopes for index in scope.layers]
    families = config.families
    return sum(
        times(each.num_experts, *sides(each, family), family == "down") for each in layers for family in families
    )


class _Run:
    """Seconds of running a model for what it says of its experts, and for what coding them changes."""

    def __init__(self, outline: Outline, place: Place) -> None:
        assert place.device is not None
        config, self._device = outline.config, place.device
        self._layers = [outline.layers[index] for scope in outline.scopes for index in scope.layers]
        self._is_coded = config.is_coded
        self._is_compensated = is_compensated(config)
        self._is_calibrated, self._is_weighed = config.calibrate != "none", wants_sensitivities(config)
        self._is_sampled, self._is_streamed = is_sampled(config, place), place.is_streamed
        self._windows, self._length = windows_seen(config, place)
        text = text_config(read_config(outline.checkpoint))
        self._routed, self._rate = experts_per_token(outline.checkpoint) or 1, multiply_add_rate(place.device)
        self._call = len(outline.layers) * _operations_time(self._layers[0].hidden_size, place.device)
        self._beside = _multiply_adds_beside(outline, text) / self._rate

    def samples(self) -> float:
        """Of writing text, a token in each window at a time."""
        return self._length * self._forward(NUM_SAMPLES) if self._is_sampled else 0.0

    def calibration(self) -> float:
        """Of a pass forward, and of what is summed over the tokens."""
        if not self._is_calibrated:
            return 0.0
        tokens = min(_BATCH, self._windows) * self._length
        if self._is_streamed:
            seconds = self._through(tokens) + sum(self._all(_run_and_sum, layer, tokens) for layer in self._layers)
        else:
            work = _sum if self._is_coded else _sum_rows
            seconds = self._forward(tokens) + sum(self._all(work, layer, tokens) for layer in self._layers)
        return self._windows * self._length / tokens * seconds

    def sensitivities(self) -> float:
        """Of passes forward and backward, a window at a time or some, and of what is summed over gradients."""
        if not self._is_weighed:
            return 0.0
        seen = math.ceil(self._windows / math.ceil(self._windows / MOST_WINDOWS))
        at_once = min(_BATCH, seen) if self._is_streamed else 1
        work = _differentiate_windows if self._is_streamed else _differentiate
        tokens = at_once * self._length
        return (
            seen / at_once * (3 * self._through(tokens) + sum(self._all(work, each, tokens) for each in self._layers))
        )

    def compensation(self) -> float:
        """Of three passes forward, and of the regressions between them."""
        if not self._is_compensated:
            return 0.0
        tokens, seconds = min(_BATCH, self._windows) * self._length, 0.0
        for layer in self._layers:
            E, P, D = layer.num_experts, layer.intermediate_size, layer.hidden_size
            seconds += E * _regression_time(math.ceil(self._windows * self._length * self._routed / E), P, D)
        passes = 3 * self._windows * self._length / tokens
        experts = sum(self._all(_run_stored, layer, tokens) for layer in self._layers)
        return seconds + passes * (self._through(tokens) + experts)

    def _forward(self, tokens: int) -> float:
        return self._through(tokens) + sum(self._all(_run, layer, tokens) for layer in self._layers)

    def _through(self, tokens: int) -> float:
        """All but the experts."""
        return self._call + tokens * self._beside

    def _all(self, work: _Work, layer: ExpertLayer, tokens: int) -> float:
        """Of all experts of a layer on so many tokens, routed at random."""
        E, P, D = layer.num_experts, layer.intermediate_size, layer.hidden_size
        return E / _few(E, P, D) * _time(work, E, P, D, tokens, self._routed, self._device)


def _few(E: int, P: int, D: int) -> int:
    return max(1, min(E, _FEW, _MOST_WEIGHTS // (len(FAMILIES) * P * D)))


@functools.cache
def _time(work: _Work, E: int, P: int, D: int, tokens: int, routed: int, device: str) -> float:
    """Of a few of E experts, with as many of the tokens as they would get among all."""
    few = _few(E, P, D)
    module = _Experts(few, P, D).to(device, torch.bfloat16 if work in _OF_STORED else torch.float32)
    x = torch.randn(tokens, D, device=device)
    chosen = torch.rand(tokens, E, device=device).argsort(1)[:, :routed]
    experts = RoutedExperts(0, "", module, ExpertsLayout(few, P, D, False, True, False))
    arguments = x, chosen, torch.ones_like(chosen, dtype=x.dtype)
    length = tokens // _BATCH if work is _differentiate_windows else tokens
    is_differentiated = work in (_differentiate, _differentiate_windows)
    with adding_squares(experts, {}, length) if is_differentiated else contextlib.nullcontext():
        return _seconds(lambda: work(experts, arguments))


def _multiply_adds_beside(outline: Outline, text: Any) -> int:
    """Of a token, in all matrices but the experts'."""
    matrices = sum(math.prod(each.shape) for each in outline.checkpoint.tensors.values() if len(each.shape) > 1)
    experts = sum(each.num_experts * each.intermediate_size * each.hidden_size for each in outline.layers.values())
    is_tied, width = getattr(text, "tie_word_embeddings", True), next(iter(outline.layers.values())).hidden_size
    looked_up = 0 if is_tied else getattr(text, "vocab_size", 0) * width
    return max(0, matrices - looked_up - len(FAMILIES) * experts)


@functools.cache
def _regression_time(tokens: int, P: int, D: int) -> float:
    """Of the regression of an expert that is given so many tokens."""
    units, missing = torch.randn(tokens, P), torch.randn(tokens, D)
    return _seconds(lambda: shrunk(units, missing, torch.arange(tokens) % 2 == 1))


@functools.cache
def _operations_time(width: int, device: str) -> float:
    """Of what is no product in a layer."""
    x = torch.randn(NUM_SAMPLES, width, device=device)
    return _seconds(lambda: [x * x for _ in range(_OPERATIONS)])


_Work = Callable[[RoutedExperts, tuple[Tensor, Tensor, Tensor]], None]


@torch.no_grad()
def _run(experts: RoutedExperts, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    experts.module(*arguments)


@torch.no_grad()
def _sum(experts: RoutedExperts, arguments: tuple[Tensor, Tensor, Tensor], *, inner: bool = True) -> None:
    LayerSums(experts, inner=inner)(experts.module, arguments)


_sum_rows = functools.partial(_sum, inner=False)


@torch.no_grad()
def _run_stored(experts: RoutedExperts, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    run_experts(experts, arguments)


@torch.no_grad()
def _run_and_sum(experts: RoutedExperts, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    LayerSums(experts, inner=True).run(*arguments)


@torch.enable_grad()
def _differentiate(experts: RoutedExperts, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    x, chosen, weights = arguments
    experts.module(x.detach().requires_grad_(), chosen, weights).sum().backward()


def _differentiate_windows(experts: RoutedExperts, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    _differentiate(experts, arguments)


_OF_STORED = (_run_stored, _run_and_sum, _differentiate_windows)
"""What is done with experts of a model that is run a layer at a time, which are read in the dtype in which they are
stored."""


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


def _fitting_time(config: FitConfig, shape: BankShape, is_weighed: bool) -> float:
    """Seconds of a fit: warm start and steps, as those of fewer and smaller experts."""
    smaller = min(1.0, math.sqrt(_EXPERT / (shape.rows * shape.columns)))
    P, D, R = (max(1, round(smaller * size)) for size in (shape.rows, shape.columns, shape.rank))
    E = min(shape.num_matrices, max(_LEAST_FITTED, _FITTED // (P * D)))
    few = BankShape(E, P, D, R, max(1, round(shape.num_bases * E / shape.num_matrices)))
    support = config.support and min(config.support, few.num_bases)
    fit = dataclasses.replace(config, rank=R, num_bases=few.num_bases, support=support, max_steps=_STEPS)
    start, step = _fit_times(fit, few, is_weighed)
    return shape.step_multiply_adds / few.step_multiply_adds * (start + config.max_steps * step)


@functools.cache
def _fit_times(config: FitConfig, shape: BankShape, is_weighed: bool) -> tuple[float, float]:
    """Seconds of a fit's warm start and of each of its steps."""
    E, _, D = shape.matrices
    experts = torch.randn(shape.matrices)
    weighed = 2 * E // 3  # gate and up, of three families
    metric = InputMetric(torch.eye(D)[None], (0,) * weighed + (None,) * (E - weighed)) if is_weighed else None

    def recorded(align_steps: int) -> list[float]:
        """When each step was reached."""
        began, reached = time.perf_counter(), list[float]()
        short = dataclasses.replace(config, align_steps=align_steps)
        fit_bank(experts, short, lambda _: reached.append(time.perf_counter() - began), metric=metric)
        return reached

    recorded(1)  # which may have to load something
    short, long = recorded(_FEW_STEPS), recorded(_FEW_STEPS + _STEPS)
    alternation = max(0.0, long[0] - short[0]) / _STEPS
    start = short[0] + max(0, config.align_steps - _FEW_STEPS) * alternation
    return start, min((each[-1] - each[0]) / max(1, len(each) - 1) for each in (short, long))


def _coding_time(budget: Bits, rate: float, E: int, N: int, K: int, is_own: bool) -> float:
    """Seconds of planning and coding E experts with N inputs and K outputs, each with an order of its own or not."""
    parts = split(E, -(-E * N * K // MOST_WEIGHTS))
    in_part = parts[0].stop
    inputs = max(1, min(N, _CODED // (in_part * K)))
    step = telling_step(E, N, K, len(parts))
    of_rows = _code_time(budget, in_part, inputs, K, min(2, len(parts)), step)
    products = (1 + 1 / step) * E * N * N * K  # feedback, twice half of them, and the experts' inner products
    orders = _READ * (E if is_own else 1) * N**3 * 4 / 3  # two factorisations in float64
    return E / in_part * N / inputs * of_rows + (products + orders) / rate


@functools.cache
def _code_time(budget: Bits, E: int, N: int, K: int, num_looks: int, step: int) -> float:
    return _seconds(functools.partial(_code, budget, *_stored_experts(E, N, K), num_looks, step))


def _stored_experts(E: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    """Normal experts (E, K, N) as they are stored, with rows of different sizes, and C."""
    generator = torch.Generator().manual_seed(0)
    octaves = _SPREAD * (torch.randn(1, 1, N, generator=generator) + torch.randn(E, 1, N, generator=generator))
    return (torch.randn(E, K, N, generator=generator) * octaves.exp2()).bfloat16(), torch.eye(N)


def _code(budget: Bits, stored: Tensor, C: Tensor, num_looks: int, step: int) -> None:
    """Plan and code experts, of which those of a family in parts are looked at once more to begin with, and of which
    one output of some shows what they have in common."""
    E, K, N = stored.shape

    def read() -> Tensor:
        return stored.clone().float().mT.contiguous()

    def problem(X: Tensor) -> CodingProblem:
        outputs = fit_outputs(squares, N, torch.ones(E, K))
        return CodingProblem(X, order_inputs(C[None]), torch.ones(E, K), C, float(N), outputs)

    X = squares = torch.empty(0)
    for _ in range(num_looks):
        X = read()
        squares = X.square().mean(1)
    multiplier = water_fill([problem(X).rows()], budget.num_bytes(stored.numel())).multiplier
    problem(rotate(read())[:, :, ::step]).bank(multiplier)
    rehearsed = problem(read()).rehearsed(multiplier)
    rehearsed.rows()
    Rehearsed(problem(read()), rehearsed.expected).code(multiplier)


def _seconds(work: Callable[[], Any]) -> float:
    """That the work takes: the least of two trials, of more while they are short. The first may have to load or compile
    something."""
    found, began = list[float](), time.perf_counter()
    while len(found) < _TRIALS or (len(found) < _MOST_TRIALS and time.perf_counter() - began < _PATIENCE):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
