"""The one objective of every solver, and its gradient with the adapters eliminated.

    f(A, a, B) = Σ_e ‖(W_e − A_e φ(T_e)) C^{1/2}‖²_F / Σ_e ‖W_e C^{1/2}‖²_F,    T_e = Σ_j a_ej B_j

With A the minimiser at (a, B), the gradient of min_A f is that of f at fixed A (variable projection; Golub and
Pereyra 1973): it flows through T alone, and no derivative of the linear solve is needed.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from globe.bank.activations import activate, jacobian
from globe.bank.adapters import refit_adapters
from globe.bank.factors import mix
from globe.bank.linalg import inner, norms

CHUNK_BYTES = 8 * 2**20
"""Bound on one temporary (experts x R x D) while experts are visited in chunks on a CPU: near its cache, and small
enough for the allocator to reuse instead of asking the system for fresh pages."""
ACCELERATOR_CHUNK_BYTES = 256 * 2**20
"""The same on an accelerator, which wants large batches."""
LEAST_EXPERTS = 2
"""Experts in a chunk at least, whatever their size."""


@dataclasses.dataclass(frozen=True)
class InputMetric:
    """What the experts multiply: a second moment for each group of experts, such as gate and up of a layer."""

    second_moments: Tensor
    """C, (G, D, D)."""
    group: tuple[int | None, ...]
    """Of each expert the C that measures its error; None for the identity."""

    def to(self, like: Tensor) -> InputMetric:
        """In the precision and on the device of another tensor."""
        return InputMetric(self.second_moments.to(like), self.group)

    def weigh(self, x: Tensor, part: slice) -> Tensor:
        """x_e C_e for the experts `part`: (e, K, D) -> (e, K, D). Runs of experts of one group share a product."""
        if set(self.group[part]) == {None}:
            return x
        weighed: list[Tensor] = []
        start = 0
        for group, run in itertools.groupby(self.group[part]):
            piece = x[start : start + len(list(run))]
            weighed.append(piece if group is None else piece @ self.second_moments[group])
            start += len(piece)
        return weighed[0] if len(weighed) == 1 else torch.cat(weighed)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The weights to be fitted and the metric of the fit."""

    weights: Tensor
    """W, (E, P, D), normalised to a standard deviation near 1."""
    metric: InputMetric | None = None
    """C of each expert; identity when None."""
    lambda_a: float = 1e-6
    """Ridge of the adapters, relative to the mean diagonal of their Gram matrices."""

    def energy(self) -> Tensor:
        """Σ_e ‖W_e C^{1/2}‖²_F, the denominator of the objective."""
        total = self.weights.new_zeros(())
        for part in expert_chunks(self.weights):
            total = total + self.squared(self.weights[part], part)
        return total

    def weigh(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        """x_e C_e for the experts `part`, half the gradient of Σ_e ‖x_e C_e^{1/2}‖²; x itself without a metric."""
        return x if self.metric is None else self.metric.weigh(x, part)

    def squared(self, x: Tensor, part: slice) -> Tensor:
        """Σ_e ‖x_e C_e^{1/2}‖² over the experts `part`."""
        return _sum_of_products(self.weigh(x, part), x)


@dataclasses.dataclass(frozen=True)
class Projection:
    """The objective with the adapters eliminated, and where asked its gradient and the adapters."""

    objective: float
    """f with exact adapters; its square root is the relative error."""
    num_fallbacks: int
    """Experts whose adapter needed more than a Cholesky factorisation."""
    grad_codes: Tensor | None = None
    """∂f/∂a, (E, M)."""
    grad_bases: Tensor | None = None
    """∂f/∂B, (M, R, D)."""
    adapters: Tensor | None = None
    """A, (E, P, R)."""


def expert_chunks(x: Tensor, num_bases: int = 0) -> list[slice]:
    """Slices of the leading dimension whose rows fill at most the device's bound, but no fewer than `LEAST_EXPERTS`.

    A chunk that reads a bank of `num_bases` has a tenth as many rows at least, to share the cost of reading it.
    """
    bound = CHUNK_BYTES if x.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    rows = max(LEAST_EXPERTS, num_bases // 10, bound // max(1, x[0].numel() * x.element_size()))
    return [slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows)]


def project(
    problem: Problem,
    codes: Tensor,
    bases: Tensor,
    activation: str,
    activation_lambda: float = 1.0,
    *,
    energy: Tensor | None = None,
    gradient: bool = False,
    grad_bases: Tensor | None = None,
    adapters: bool = False,
) -> Projection:
    """Evaluate min_A f at codes (E, M) and bases (M, R, D), visiting the experts in chunks.

    With `gradient` its derivatives come along; that of the bases is added to `grad_bases` where that is given.
    """
    energy = problem.energy() if energy is None else energy
    total, num_fallbacks = problem.weights.new_zeros(()), 0
    grad_codes = torch.empty_like(codes) if gradient else None
    if gradient and grad_bases is None:
        grad_bases = torch.zeros_like(bases)
    kept = problem.weights.new_empty(*problem.weights.shape[:2], bases.shape[1]) if adapters else None
    for part in expert_chunks(problem.weights, bases.shape[0]):
        w, t = problem.weights[part], mix(codes[part], bases)
        n = activate(t, activation, activation_lambda)
        a, failed = refit_adapters(w, n, lambda_a=problem.lambda_a, weighed=problem.weigh(n, part))
        residual = torch.baddbmm(w, a, n, beta=-1)
        weighed = problem.weigh(residual, part)
        total = total + _sum_of_products(weighed, residual)
        num_fallbacks += failed
        del n
        if kept is not None:
            kept[part] = a
        if grad_codes is not None and grad_bases is not None:
            grad_t = (a.mT @ weighed).mul_(2 / energy)
            del residual, weighed
            if activation != "identity":
                grad_t.mul_(jacobian(t, activation, activation_lambda))
            grad_codes[part] = grad_t.flatten(1) @ bases.flatten(1).mT
            grad_bases.flatten(1).addmm_(codes[part].mT, grad_t.flatten(1))
            del grad_t
        del t, a  # or they would live beside the next chunk's
    objective = float(total / energy)
    return Projection(objective, num_fallbacks, grad_codes, grad_bases, kept)


def _sum_of_products(weighed: Tensor, x: Tensor) -> Tensor:
    """Σ weighed ⊙ x, without a product to be kept where they are the same."""
    return norms(x).square().sum() if weighed is x else inner(weighed, x).sum()


def objective(
    problem: Problem, adapters: Tensor, codes: Tensor, bases: Tensor, activation: str, activation_lambda: float = 1.0
) -> float:
    """f at given factors: the squared relative error in the problem's metric."""
    return features_objective(problem, adapters, activate(mix(codes, bases), activation, activation_lambda))


def features_objective(problem: Problem, adapters: Tensor, features: Tensor) -> float:
    """f at given adapters (E, P, R) and features φ(T) (E, R, D)."""
    total = problem.weights.new_zeros(())
    for part in expert_chunks(problem.weights):
        residual = torch.baddbmm(problem.weights[part], adapters[part], features[part], beta=-1)
        total = total + problem.squared(residual, part)
    return float(total / problem.energy())


def relative_errors(weights: Tensor, approximation: Tensor) -> Tensor:
    """‖W_e − What_e‖_F / ‖W_e‖_F of each expert, (E,); 0 for a zero expert that is met exactly."""
    missed, sizes = missed_and_sizes(weights, approximation)
    return torch.where(missed == 0, missed, missed / sizes).to(weights.dtype)


def missed_and_sizes(weights: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
    """‖W_e − What_e‖_F and ‖W_e‖_F of each expert, (E,) each, in float64: whatever the experts' units, no square
    leaves its range."""
    pairs = [
        (norms((weights[part] - approximation[part]).double()), norms(weights[part].double()))
        for part in expert_chunks(weights)
    ]
    missed, sizes = zip(*pairs, strict=True)
    return torch.cat(missed), torch.cat(sizes)
