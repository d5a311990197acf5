"""What callers gave for a dataclass's fields, held against the types that the fields declare. A leaf."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NAMES = {int: "an integer", float: "a number", str: "a string", types.NoneType: "None"}


class FieldTypeError(TypeError):
    """A value is of another type than its field.

    Attributes:
        field: the field's name.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def fit(instance: object) -> None:
    """Give a dataclass's fields values of exactly the types they declare, where those they have mean the same:
    Python's own number for one of numpy's, a tuple for any other collection, a string for a path.

    For `__post_init__`, of frozen ones too.

    Raises:
        FieldTypeError: a value is of another type. A bool is no number, and a string no collection.
    """
    cls: Any = type(instance)
    for name, hint in _hints(cls).items():
        value = getattr(instance, name)
        try:
            fitted = _fitted(value, hint)
        except (TypeError, ValueError):
            raise FieldTypeError(f"{name} must be {_described(hint)}, not {value!r}", name) from None
        if fitted is not value:
            object.__setattr__(instance, name, fitted)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fitted(value: Any, hint: Any) -> Any:
    """The value as the type says; raises TypeError or ValueError where it is of another."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _fitted_to_one_of(value, get_args(hint))
    if origin is Literal:
        fits = any(value is known or (type(value) is type(known) and value == known) for known in get_args(hint))
    elif origin is Sequence:
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
            return tuple(_fitted(item, get_args(hint)[0]) for item in value)
        fits = False
    elif origin is Mapping:
        of_keys, of_values = get_args(hint)
        if isinstance(value, Mapping):
            return {_fitted(key, of_keys): _fitted(item, of_values) for key, item in value.items()}
        fits = False
    elif hint is int and not isinstance(value, bool):
        return operator.index(value)
    elif hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    elif hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    else:
        fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not fits:
        raise TypeError
    return value


def _fitted_to_one_of(value: Any, hints: Iterable[Any]) -> Any:
    for hint in hints:
        try:
            return _fitted(value, hint)
        except (TypeError, ValueError):
            continue
    raise TypeError


def _described(hint: Any) -> str:
    """A type in words."""
    words = list(dict.fromkeys(_words(hint)))
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _words(hint: Any) -> Iterator[str]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for alternative in get_args(hint):
            yield from _words(alternative)
    elif origin is Literal:
        yield from map(repr, get_args(hint))
    elif hint is bool:
        yield from ("True", "False")
    elif origin is Sequence:
        yield f"a list of {_NAMES[get_args(hint)[0]].split()[-1]}s"
    elif origin is Mapping:
        yield "a mapping of {}s to {}s".format(*(_NAMES[part].split()[-1] for part in get_args(hint)))
    else:
        yield _NAMES[hint]
