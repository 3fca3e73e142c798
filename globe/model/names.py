"""The names of a compressed model's tensors: the one place that the writer and the loader both ask."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from globe.model.bank_spec import BankSpec
from globe.terms import FAMILIES, Family

BANKS = "globe_banks"
"""The module that holds banks: of one layer inside its experts module, of several inside the base model."""

DENSE_PARAMETER: Mapping[str, str] = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
"""The parameter of transformers' fused experts that holds a family."""

TRIPWIRE_SHAPE = (1, 1, 1)
"""Of the tripwire: one element, in three dimensions like the parameter whose name it has."""


def adapters_parameter(family: str) -> str:
    """The experts module's parameter with the family's adapters, (E, P, R)."""
    return f"globe_{family}_adapters"


def codes_parameter(family: str) -> str:
    """The experts module's parameter with the family's codes, (E, M)."""
    return f"globe_{family}_codes"


def coded_parameter(family: str, part: str) -> str:
    """The experts module's parameter with a part of what is stored of a coded family (`CodedSpec.shapes`)."""
    return f"globe_{family}_{part}"


def dense_parameter(family: str) -> str:
    """The experts module's parameter with gate or up, (E, P, D), when only the other one is compressed."""
    return f"globe_{family}_dense"


def is_factor(name: str) -> bool:
    """Whether a state-dict name belongs to GloBE."""
    return any(part.startswith("globe_") for part in name.split("."))


@dataclasses.dataclass(frozen=True)
class FactorNames:
    """State-dict names of the factors, given where the model keeps its experts.

    `globe.model.expert_modules.factor_names` reads the paths off a model.
    """

    experts: Mapping[int, str]
    """Path of the experts module of each layer that has routed experts: {0: "model.layers.0.mlp.experts", …}."""
    base: str
    """Path of the base model, which holds the shared banks: "model"; empty for a model that is its own base."""

    def adapters(self, layer: int, family: str) -> str:
        """Name of A, (E, P, R)."""
        return f"{self.experts[layer]}.{adapters_parameter(family)}"

    def codes(self, layer: int, family: str) -> str:
        """Name of a, (E, M)."""
        return f"{self.experts[layer]}.{codes_parameter(family)}"

    def coded(self, layer: int, family: str, part: str) -> str:
        """Name of a part of a coded family."""
        return f"{self.experts[layer]}.{coded_parameter(family, part)}"

    def dense(self, layer: int, family: str) -> str:
        """Name of the dense half of gate_up_proj, (E, P, D): gate or up, when only the other one is compressed."""
        return f"{self.experts[layer]}.{dense_parameter(family)}"

    def bases(self, bank: BankSpec) -> str:
        """Name of B, (M, R, D)."""
        owner = self.base if bank.shared else self.experts[bank.layers[0]]
        return f"{owner}.{BANKS}.{bank.name}.bases".removeprefix(".")

    def tripwire(self, compressed: Iterable[tuple[int, str]]) -> str:
        """Name of the tripwire, given all that is compressed by layer and family: a dense parameter of the first layer.

        transformers without GloBE finds a tensor of the wrong size there and stops, instead of filling the experts with
        random numbers.
        """
        layer, place = min((layer, [*FAMILIES].index(family)) for layer, family in compressed)
        return f"{self.experts[layer]}.{DENSE_PARAMETER[FAMILIES[place]]}"


def dense_halves(families: Collection[str]) -> list[Family]:
    """The half of gate_up_proj to store apart, given the families of a layer that are compressed: gate, up or none."""
    halves: list[tuple[Family, Family]] = [("gate", "up"), ("up", "gate")]
    return [half for half, other in halves if half not in families and other in families]
