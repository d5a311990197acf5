"""Tables: raw values for JSON and plots, Markdown for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | None


def text(value: Value) -> str:
    return "" if value is None else str(value)


def percent(value: Value) -> str:
    return "" if value is None else f"{100 * float(value):.1f} %"


def tenths(value: Value) -> str:
    return "" if value is None else f"{float(value):,.1f}"


def hundredths(value: Value) -> str:
    return "" if value is None else f"{float(value):,.2f}"


def count(value: Value) -> str:
    return "" if value is None else f"{int(value):,}"


@dataclass(frozen=True, slots=True)
class Column:
    """Attributes:
    key: in JSON.
    title: in Markdown.
    show: a value as people read it.
    """

    key: str
    title: str
    show: Callable[[Value], str] = text


@dataclass(frozen=True)
class Table:
    """Attributes:
    key: names the table in JSON and its plot's file.
    note: a sentence or two under the table.
    """

    key: str
    title: str
    columns: Sequence[Column]
    rows: list[Sequence[Value]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        lines = [
            f"### {self.title}",
            "",
            _line([column.title for column in self.columns]),
            _line(["---" if column.show is text else "---:" for column in self.columns]),
        ]
        for row in self.rows:
            lines.append(_line([c.show(value) for c, value in zip(self.columns, row, strict=True)]))
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])

    def to_json(self) -> list[dict[str, Any]]:
        """One object a row, with values as they were measured."""
        return [{c.key: value for c, value in zip(self.columns, row, strict=True)} for row in self.rows]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
