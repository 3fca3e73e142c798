"""Where a transformers model keeps its routed experts, and how it lays them out; a model on the meta device will do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from globe.errors import UnsupportedModelError
from globe.model.names import FactorNames


@dataclasses.dataclass(frozen=True)
class ExpertsLayout:
    """How an experts module holds its matrices: `gate_up_proj` and `down_proj`, of all experts each."""

    num_experts: int
    """E."""
    intermediate_size: int
    """P."""
    hidden_size: int
    """D."""
    is_transposed: bool
    """gate_up_proj is (E, D, 2P) and down_proj (E, P, D), instead of (E, 2P, D) and (E, D, P)."""
    is_concatenated: bool
    """The 2P are P of gate, then P of up; otherwise gate and up alternate."""
    has_bias: bool
    """gate_up_proj_bias (E, 2P) and down_proj_bias (E, D) are there too; GloBE leaves them as they are."""
    presorted: bool = False
    """forward takes every token once for each expert, (E·T, D), those not routed to it zeroed, and no indices."""
    num_identity: int = 0
    """Experts behind the E that return their input; gate_up_proj has unused rows for them."""

    @property
    def dense_parameters(self) -> dict[str, tuple[int, int, int]]:
        """Shapes of the dense parameters, by name."""
        E, P, D = self.num_experts, self.intermediate_size, self.hidden_size
        if self.is_transposed:
            return {"gate_up_proj": (E, D, 2 * P), "down_proj": (E, P, D)}
        return {"gate_up_proj": (E + self.num_identity, 2 * P, D), "down_proj": (E, D, P)}


_FLAGS = ("is_transposed", "is_concatenated", "has_bias", "has_gate")
_PLAIN = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True}
_UNDECORATED: Mapping[str, Mapping[str, bool]] = {
    "Llama4TextExperts": {**_PLAIN, "is_transposed": True, "presorted": True},
    "LongcatFlashExperts": _PLAIN,
}
"""Classes without transformers' `use_experts_implementation`, and the flags it would leave on their instances."""


@dataclasses.dataclass(frozen=True)
class ExpertMatrices:
    """One expert; tokens are multiplied by it from the left."""

    gate_up: Tensor
    """(D, 2P), arranged as in the module."""
    down: Tensor
    """(P, D)."""
    gate_up_bias: Tensor | float = 0.0
    down_bias: Tensor | float = 0.0


@dataclasses.dataclass(frozen=True)
class RoutedExperts:
    """The experts module of one decoder layer."""

    layer: int
    """Number of the decoder layer."""
    path: str
    """Of the module in the model: model.layers.0.mlp.experts."""
    module: nn.Module
    layout: ExpertsLayout

    @property
    def dtype(self) -> torch.dtype:
        """In which they are computed."""
        return self.module.get_parameter("down_proj").dtype

    @property
    def device(self) -> torch.device:
        """Where they are computed."""
        return self.module.get_parameter("down_proj").device

    def matrices(self, expert: int, dtype: torch.dtype) -> ExpertMatrices:
        """Those of one expert, in a dtype."""
        gate_up, down = (self._part(name, expert, dtype) for name in ("gate_up_proj", "down_proj"))
        if not self.layout.is_transposed:
            gate_up, down = gate_up.mT, down.mT
        return ExpertMatrices(gate_up, down, *self.biases(expert, dtype))

    def biases(self, expert: int, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
        """Of one expert's two products."""
        if not self.layout.has_bias:
            return 0.0, 0.0
        return self._part("gate_up_proj_bias", expert, dtype), self._part("down_proj_bias", expert, dtype)

    def _part(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        return self.module.get_parameter(name)[expert].detach().to(dtype)


def find_experts(model: nn.Module) -> list[RoutedExperts]:
    """The dense routed experts of a model, by layer.

    Raises `UnsupportedModelError` if there are none, if their class is not understood, or if a layer has more than one
    set of them.
    """
    routed = [_routed_experts(path, module) for path, module in model.named_modules() if _holds_experts(module)]
    if not routed:
        others = sorted({type(module).__name__ for module in model.modules() if "Expert" in type(module).__name__})
        raise UnsupportedModelError(
            f"{type(model).__name__} has no routed experts that GloBE can factorise: it looks for modules that hold "
            f"them in 3-D parameters gate_up_proj and down_proj; found {', '.join(others) or 'no experts at all'}"
        )
    by_layer: dict[int, RoutedExperts] = {}
    for experts in routed:
        if (other := by_layer.setdefault(experts.layer, experts)) is not experts:
            raise UnsupportedModelError(
                f"{type(model).__name__} has two sets of routed experts numbered {experts.layer}: "
                f"{other.path} and {experts.path}"
            )
    return [by_layer[layer] for layer in sorted(by_layer)]


def experts_layout(module: nn.Module) -> ExpertsLayout:
    """Read the layout off an experts module.

    transformers' `use_experts_implementation` leaves flags on the instance that say how the module's forward uses its
    parameters. Raises `UnsupportedModelError` naming the class if they are not there or do not fit the parameters.
    """
    name = type(module).__name__
    flags: Mapping[str, Any] = _UNDECORATED.get(name, vars(module))
    if missing := [flag for flag in _FLAGS if flag not in flags]:
        raise UnsupportedModelError(
            f"{name} is not supported: it does not say how its experts are laid out ({', '.join(missing)} not set)"
        )
    if not flags["has_gate"]:
        raise UnsupportedModelError(f"{name} is not supported: its experts have no gate")
    shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)}
    transposed = bool(flags["is_transposed"])
    E, *sides = shapes["down_proj"]
    P, D = sides if transposed else reversed(sides)
    layout = ExpertsLayout(
        E,
        P,
        D,
        transposed,
        bool(flags["is_concatenated"]),
        bool(flags["has_bias"]),
        presorted=bool(flags.get("presorted")),
        num_identity=getattr(module, "zero_expert_num", 0),
    )
    biases = {"gate_up_proj_bias": (E, 2 * P), "down_proj_bias": (E, D)} if layout.has_bias else {}
    if shapes != layout.dense_parameters | biases:
        raise UnsupportedModelError(
            f"{name} is not supported: expected parameters {layout.dense_parameters | biases}, found {shapes}"
        )
    return layout


def factor_names(model: nn.Module) -> FactorNames:
    """The names that the factors of a dense model will have, read off its modules; raises as `find_experts` does."""
    base = getattr(model, "base_model", model)
    path = next(path for path, module in model.named_modules() if module is base)
    return FactorNames(experts={experts.layer: experts.path for experts in find_experts(model)}, base=path)


def _holds_experts(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    stacked = {name for name, parameter in parameters.items() if parameter.dim() == 3}
    # fused shared experts keep gate_proj apart
    return "down_proj" in stacked and bool(stacked & {"gate_up_proj", "up_proj"}) and "gate_proj" not in stacked


def _routed_experts(path: str, module: nn.Module) -> RoutedExperts:
    layout = experts_layout(module)
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise UnsupportedModelError(f"{path} ({type(module).__name__}) is not supported: cannot tell its layer number")
    return RoutedExperts(numbers[0], path, module, layout)
