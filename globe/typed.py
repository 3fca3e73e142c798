"""Values as their annotations say: settings that a caller gives, and records that a file holds."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import os
import reprlib
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from globe.errors import GlobeError

T = TypeVar("T")

LARGEST_INT = 2**63 - 1
_NAMES = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}
_FEW = reprlib.Repr()
_FEW.maxstring = _FEW.maxother = 60


class _MisfitError(Exception):
    """What does not fit, and where: the path from the value that was to be fitted."""

    def __init__(self, value: object, expected: str, path: str = "") -> None:
        super().__init__()
        self.value, self.expected, self.path = value, expected, path

    def within(self, place: str) -> _MisfitError:
        return _MisfitError(self.value, self.expected, place + self.path)


class _Missing:
    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


def shown(value: object) -> str:
    """The value's repr, cut short where it is long."""
    try:
        text = _FEW.repr(value)
    except ValueError:  # an int of thousands of digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 200 else f"{text[:197]}..."


def fit_settings(settings: Any, error: type[GlobeError], **least: float) -> None:
    """Bring the fields of a frozen dataclass to their annotated types, in place: a list to a tuple, a numpy number to
    Python's, a path to a string, a lone value to a tuple of one.

    Raises `error` naming the first field that has no such reading, is not finite, or is below its `least` value.
    """
    for name, kind in _hints(type(settings)).items():
        value = getattr(settings, name)
        try:
            fitted = _fit(kind, value, lenient=True)
        except _MisfitError as misfit:
            if _choices(kind) and isinstance(value, str):
                raise error(f"{name} {shown(value)} is unknown; choose {_described(kind)}") from None
            raise error(f"{name}{misfit.path} is {shown(misfit.value)}; it must be {misfit.expected}") from None
        if name in least and fitted is not None and fitted < least[name]:
            raise error(f"{name} is {shown(fitted)}; it must be at least {least[name]:g}")
        object.__setattr__(settings, name, fitted)


def parsed(kind: type[T], value: Any, place: str, error: type[GlobeError]) -> T:
    """A value of JSON as `kind` says: a dataclass from an object, whose unknown keys are left out, a tuple from a list.

    Raises `error` naming what does not fit, as a path behind `place`.
    """
    try:
        return _fit(kind, value, lenient=False)
    except _MisfitError as misfit:
        path = misfit.path.removeprefix(".")
        raise error(
            f"{place}: {path or 'the content'} is {shown(misfit.value)}; it must be {misfit.expected}"
        ) from None


def _fit(kind: Any, value: Any, lenient: bool) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Union or origin is types.UnionType:
        return _fit_union(kind, value, lenient)
    if origin is Literal:
        if not isinstance(value, str | int) or value not in arguments:
            raise _MisfitError(value, _described(kind))
        return value
    if dataclasses.is_dataclass(kind):
        return _fit_dataclass(kind, value, lenient)
    if origin in (tuple, list):
        return origin(_fit_items(kind, arguments[0], value, lenient))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _MisfitError(value, _described(kind))
        return {key: _within(f"[{shown(key)}]", arguments[1], item, lenient) for key, item in value.items()}
    return _fit_scalar(kind, value, lenient)


def _fit_union(kind: Any, value: Any, lenient: bool) -> Any:
    """The first of the options that fits; the deepest misfit tells most."""
    deepest = _MisfitError(value, _described(kind))
    for option in get_args(kind):
        try:
            return _fit(option, value, lenient)
        except _MisfitError as misfit:
            if len(misfit.path) > len(deepest.path):
                deepest = misfit
    raise deepest


def _fit_dataclass(kind: Any, value: Any, lenient: bool) -> Any:
    if lenient:
        if not isinstance(value, kind):
            raise _MisfitError(value, _described(kind))
        return value
    if not isinstance(value, Mapping):
        raise _MisfitError(value, "an object")
    hints, fields = _hints(kind), dict[str, Any]()
    for field in dataclasses.fields(kind):
        if field.name in value:
            fields[field.name] = _within(f".{field.name}", hints[field.name], value[field.name], lenient)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _MisfitError(_MISSING, _described(hints[field.name]), f".{field.name}")
    return kind(**fields)


def _fit_items(kind: Any, item: Any, value: Any, lenient: bool) -> Iterable[Any]:
    if not isinstance(value, list | tuple):
        if not lenient or isinstance(value, Mapping):
            raise _MisfitError(value, _described(kind))
        value = _plain(item, value)
        if isinstance(value, str) or not isinstance(value, Iterable):
            value = (value,)
    if item is float and not lenient and all(type(entry) is float for entry in value):  # long columns of records
        return value
    return [_within(f"[{number}]", item, entry, lenient) for number, entry in enumerate(value)]


def _within(place: str, kind: Any, value: Any, lenient: bool) -> Any:
    try:
        return _fit(kind, value, lenient)
    except _MisfitError as misfit:
        raise misfit.within(place) from None


def _fit_scalar(kind: Any, value: Any, lenient: bool) -> Any:
    if lenient:
        value = _plain(kind, value)
    if isinstance(value, bool) and kind is not bool:  # which is an int to Python
        raise _MisfitError(value, _described(kind))
    if kind is float and isinstance(value, int) and abs(value) <= LARGEST_INT:
        return float(value)
    if not isinstance(value, kind) or (kind is int and abs(value) > LARGEST_INT):
        raise _MisfitError(value, _described(kind))
    if lenient and kind is float and not math.isfinite(value):
        raise _MisfitError(value, _described(kind))
    return value


def _plain(kind: Any, value: Any) -> Any:
    """What a caller means by another library's number, or by a value that has one reading as `kind`."""
    if type(value).__module__ in ("numpy", "torch") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is str and type(value) is int:
        return str(value)
    return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value


def _choices(kind: Any) -> list[str]:
    """The words that a kind allows, where it allows no more than words (and null)."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    options = [option for option in options if option is not type(None)]
    literal = all(get_origin(option) is Literal for option in options)
    return [str(word) for option in options for word in get_args(option)] if literal else []


def _described(kind: Any) -> str:
    """What a kind asks for, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if choices := _choices(kind):
        *others, last = choices
        return f"{', '.join(others)} or {last}" if others else last
    if origin is Union or origin is types.UnionType:
        return " or ".join(_described(option) for option in arguments)
    if origin in (tuple, list):
        return f"a list, each entry {_described(arguments[0])}"
    if origin in (dict, Mapping):
        return f"an object, each value {_described(arguments[1])}"
    return _NAMES.get(kind) or f"a {kind.__name__}"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def documented(kind: type[T]) -> type[T]:
    """Have `help` tell what each field of a dataclass means: the docstrings below them end up in the class's own."""
    told = [textwrap.fill(f"{name}: {doc}", 96, subsequent_indent="    ") for name, doc in field_docs(kind).items()]
    kind.__doc__ = "\n\n".join([kind.__doc__ or "", *told])
    return kind


def field_docs(kind: type) -> dict[str, str]:
    """The docstring below each field of a class, as one paragraph; none where there is no source."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except OSError:
        return {}
    docs = dict[str, str]()
    for field, below in itertools.pairwise(definition.body):  # pyright: ignore[reportAttributeAccessIssue]
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
            case _:
                pass
    return docs
