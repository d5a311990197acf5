"""Command-line options made from dataclasses, so that no option, default or help text is written twice."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Group, Parameter

Options = dict[str, Any]
"""Options by field name. Those that nobody gave are missing, so that the dataclass's own defaults hold."""


@dataclass(frozen=True, slots=True)
class OptionsOf:
    """A source of options: the fields of a dataclass.

    Attributes:
        cls: the dataclass; the "Attributes:" section of its docstring has the help texts.
        title: heading of these options in the help.
        omit: fields that are no options.
        defaults: defaults of this command that differ from the dataclass's.
    """

    cls: type
    title: str
    omit: Collection[str] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def parameters(self) -> list[inspect.Parameter]:
        """One keyword-only parameter per field, annotated for cyclopts."""
        group = Group.create_ordered(self.title)
        helps = attribute_docs(self.cls)
        return [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=self.defaults.get(field.name, _default(field)),
                annotation=_annotation(field, hint, helps[field.name], group),
            )
            for field, hint in self._fields()
        ]

    def gather(self, given: Mapping[str, Any]) -> Options:
        """Values of the fields: those the user gave over this command's defaults. Other names are left out."""
        options = dict(self.defaults)
        for field, hint in self._fields():
            if field.name in given:
                value = given[field.name]
                options[field.name] = dict(value) if typing.get_origin(hint) is Mapping else value
        return options

    def _fields(self) -> list[tuple[dataclasses.Field[Any], Any]]:
        """Fields with their types."""
        hints = typing.get_type_hints(self.cls)
        return [(field, hints[field.name]) for field in dataclasses.fields(self.cls) if field.name not in self.omit]


def takes(**sources: OptionsOf) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's keyword arguments named in `sources` by the options they stand for.

    The command still receives one `Options` dict for each of those arguments, as `OptionsOf.gather` makes it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        kept = [p for name, p in signature.parameters.items() if name not in sources]
        made = [parameter for source in sources.values() for parameter in source.parameters()]

        @functools.wraps(command)
        def with_options(*args: Any, **kwargs: Any) -> None:
            own = {p.name: kwargs[p.name] for p in kept if p.name in kwargs}
            command(*args, **own, **{argument: source.gather(kwargs) for argument, source in sources.items()})

        with_options.__signature__ = signature.replace(parameters=[*kept, *made])  # type: ignore[attr-defined]
        with_options.__annotations__ = {p.name: p.annotation for p in (*kept, *made)}
        return with_options

    return decorate


def attribute_docs(cls: type) -> dict[str, str]:
    """Field name to text, from the "Attributes:" section of a docstring; "a, b: text" counts for both."""
    section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    docs: dict[str, str] = {}
    for entry in re.split(r"^ {4}(?=\w)", section[1] if section else "", flags=re.MULTILINE)[1:]:
        names, _, text = entry.partition(":")
        docs |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(text.split()))
    return docs


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return tuple(made.items()) if isinstance(made, Mapping) else made
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _annotation(field: dataclasses.Field[Any], hint: Any, text: str, group: Group) -> Any:
    """How cyclopts shows and reads one field."""
    look: dict[str, Any] = {}
    if hint is bool:
        # "--no-..." makes sense only for what is on by default.
        look = {"negative": None if field.default else ()}
    elif typing.get_origin(hint) is Mapping:
        hint = Sequence[tuple[int, float]]
        look = {"metavar": "ID NUMBER", "negative": (), "show_default": False}
    elif field.default == ():
        hint = Sequence[str] if hint == str | Sequence[str] else hint
        look = {"negative": (), "show_default": False}
    elif {int, str} <= set(typing.get_args(hint)):
        look = {"metavar": "SIZE"}
    return Annotated[hint, Parameter(help=text, group=group, **look)]
