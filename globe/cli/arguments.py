"""How the settings' dataclasses become arguments of the command line, where tyro's own way reads badly."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from globe.sweeps.settings import parse_layers
from globe.typed import field_docs

registry = ConstructorRegistry()


@registry.struct_rule
def _fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Fields with their docstrings as one paragraph each; tyro keeps the line breaks of the source."""
    if not dataclasses.is_dataclass(info.type) or not (docs := field_docs(info.type)):
        return None
    kinds = typing.get_type_hints(info.type, include_extras=True)
    fields = list[StructFieldSpec]()
    for field in dataclasses.fields(info.type):
        default = getattr(info.default, field.name, field.default)
        default = tyro.MISSING if default is dataclasses.MISSING else default
        fields.append(StructFieldSpec(field.name, kinds[field.name], default, docs.get(field.name)))
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
