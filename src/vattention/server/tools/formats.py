"""The formats there are, and which of them a model uses."""

from __future__ import annotations

from vattention.errors import ConfigError
from vattention.server.tools.hermes import Hermes
from vattention.server.tools.llama import Llama
from vattention.server.tools.mistral import Mistral
from vattention.server.tools.reading import CallFormat

FORMATS: tuple[CallFormat, ...] = (Hermes(), Llama(), Mistral())


def format_named(name: str) -> CallFormat:
    """Raises:
    ConfigError: there is none of that name.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    raise ConfigError(f"there is no tool call parser {name!r}; --tool-call-parser takes {format_names()}")


def format_of(template: str) -> CallFormat | None:
    """The format in which a chat template writes calls; None for one that is not known here."""
    return next((known for known in FORMATS if known.is_of(template)), None)


def format_names() -> str:
    """For messages."""
    return ", ".join(known.name for known in FORMATS)
