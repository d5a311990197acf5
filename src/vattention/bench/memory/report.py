"""The whole benchmark: its tables as they come, and everything once more for files."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from typing import Any

from vattention import __version__
from vattention.bench.memory.sections import SECTIONS
from vattention.bench.memory.settings import Settings
from vattention.bench.memory.tables import Table
from vattention.errors import ConfigError


def run(settings: Settings, names: Sequence[str], show: Callable[[Table], None]) -> dict[str, Table]:
    """Measure the named sections and show each table when it is there; returns them by their keys.

    Raises:
        ConfigError: there is no such section.
    """
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no part of this benchmark; it has {', '.join(SECTIONS)}")
    tables = {}
    for name in names or SECTIONS:
        for table in SECTIONS[name](settings):
            show(table)
            tables[table.key] = table
    return tables


def to_json(settings: Settings, names: Sequence[str], tables: dict[str, Table]) -> dict[str, Any]:
    """All figures as measured, and what they were measured with."""
    words = ["vattention", "bench", "memory", settings.model]
    words += [word for name in names for word in ("--only", name)]
    words += ["--scale", f"{settings.scale:g}", "--seed", str(settings.seed)]
    return {
        "command": shlex.join(words),
        "settings": asdict(settings),
        "date": date.today().isoformat(),
        "versions": {
            "vattention": __version__,
            **{name: version(name) for name in ("numpy", "torch", "transformers")},
        },
        "tables": {key: {"title": table.title, "rows": table.to_json()} for key, table in tables.items()},
    }
