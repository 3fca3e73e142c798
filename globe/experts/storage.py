"""The factors of a bank as they are stored."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from globe.bank.activations import activate
from globe.bank.adapters import refit_adapters
from globe.bank.factors import Factors, compose, mix
from globe.bank.objective import expert_chunks, missed_and_sizes
from globe.errors import SettingsError
from globe.experts.stack import ExpertStack
from globe.terms import Family


@dataclasses.dataclass(frozen=True)
class StoredFactors:
    """Factors in the precision they are stored in, and what that costs."""

    adapters: dict[tuple[int, Family], Tensor]
    """A (E, P, R) by layer and family, in the units of the weights."""
    codes: dict[tuple[int, Family], Tensor]
    """a (E, M) by layer and family."""
    bases: Tensor
    """B (M, R, D)."""
    errors: dict[tuple[int, Family], float]
    """‖W − What‖_F / ‖W‖_F of each layer and family, after rounding."""
    expert_errors: dict[tuple[int, Family], list[float]]
    """The same of every expert."""


@torch.no_grad()
def to_storage(
    stack: ExpertStack,
    factors: Factors,
    dtype: torch.dtype,
    lambda_a: float = 1e-6,
) -> StoredFactors:
    """Round codes and bases, refit the adapters to what was rounded, fold σ in and round them too.

    The adapters are ill-conditioned enough to amplify the bank's rounding; refitted, in the metric of the fit, they
    make up for most of it. The errors are in plain Frobenius norms; that of zeros, whose
    factors are exact, is 0. Raises `SettingsError` for adapters that leave the range of `dtype`.
    """
    codes, bases = factors.codes.to(dtype), factors.bases.to(dtype)
    wide_codes, wide_bases = codes.to(factors.codes.dtype), bases.to(factors.bases.dtype)
    stored = StoredFactors({}, {}, bases, {}, {})
    for group in stack.groups:
        key: tuple[int, Family] = (group.layer, group.family)
        adapters, errors, missed, energy = list[Tensor](), list[float](), 0.0, 0.0
        weights, own_codes = stack.weights[group.part], wide_codes[group.part]
        for part in expert_chunks(weights):
            features = activate(mix(own_codes[part], wide_bases), factors.activation)
            place = slice(group.part.start + part.start, group.part.start + part.stop)
            weighed = features if stack.metric is None else stack.metric.weigh(features, place)
            exact, _ = refit_adapters(weights[part], features, lambda_a=lambda_a, weighed=weighed)
            adapters.append(group.restore(exact, part).to(dtype))
            approximation = adapters[-1].to(features) @ features
            own_missed, sizes = missed_and_sizes(group.restore(weights[part], part), approximation)
            if not bool(own_missed.isfinite().all()):
                raise SettingsError(
                    f"the adapters of layer {group.layer} {group.family} leave the range of "
                    f"{str(adapters[-1].dtype).removeprefix('torch.')}: choose --factor-dtype bfloat16 or float32"
                )
            errors += torch.where(own_missed == 0, 0.0, own_missed / sizes).tolist()
            missed, energy = missed + float(own_missed.square().sum()), energy + float(sizes.square().sum())
        stored.adapters[key], stored.codes[key] = (
            torch.cat(adapters),
            codes[group.part].clone(memory_format=torch.contiguous_format),
        )
        stored.expert_errors[key] = errors
        stored.errors[key] = math.sqrt(missed / energy) if energy > 0 else 0.0
    return stored


def restore(adapters: Tensor, codes: Tensor, bases: Tensor, activation: str) -> Tensor:
    """The experts (E, P, D) of one layer and family from the factors as they are stored, composed in float32."""
    wide = bases.float()
    return torch.cat(
        [compose(adapters[part].float(), codes[part].float(), wide, activation) for part in expert_chunks(adapters)]
    )
