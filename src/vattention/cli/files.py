"""Files that the user names: what goes wrong with them is the user's error, told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from vattention.errors import ConfigError


def read_text(path: Path) -> str:
    """The whole file as UTF-8.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {_reason(error)}") from error


def read_lines(path: Path) -> list[str]:
    """`read_text`, cut at newlines only: JSON may hold other line separators as they are."""
    return read_text(path).removesuffix("\n").split("\n")


def open_output(path: Path) -> TextIO:
    """Open a file for writing UTF-8.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8"
