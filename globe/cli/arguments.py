"""How the settings' dataclasses become arguments of the command line, where tyro's own way reads badly."""

from __future__ import annotations

import typing
from typing import Any

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from globe.measure.settings import EvaluateConfig
from globe.plan.settings import CompressConfig
from globe.sweeps.settings import SweepConfig, parse_layers
from globe.typed import field_docs

SETTINGS = (CompressConfig, EvaluateConfig, SweepConfig)

registry = ConstructorRegistry()


@registry.struct_rule
def _settings(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Fields with their docstrings as one paragraph each; tyro keeps the line breaks of the source."""
    if info.type not in SETTINGS or not isinstance(info.default, SETTINGS):
        return None
    kinds, docs = typing.get_type_hints(info.type), field_docs(info.type)
    fields = (StructFieldSpec(name, kinds[name], getattr(info.default, name), docs[name]) for name in docs)
    return StructConstructorSpec(info.type, tuple(fields))


@registry.primitive_rule
def _layers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Indices and runs of them, as in a sweep: `3 7`, `0-3 7` or `0-3,7`."""
    if info.type != tuple[int, ...] | None:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="N|N-M [...]",
        instance_from_str=lambda choices: parse_layers(",".join(choices)),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["all"] if value is None else [str(index) for index in value],
    )
