"""Calls of functions in what a model writes: a format for each family of models, and what cuts a reply by them."""

from __future__ import annotations

from vattention.server.tools.calls import Call, Content, Piece
from vattention.server.tools.forced import Function, forced_calls
from vattention.server.tools.formats import format_named, format_names, format_of
from vattention.server.tools.reading import CallFormat
from vattention.server.tools.splitter import CallSplitter

__all__ = [
    "Call",
    "CallFormat",
    "CallSplitter",
    "Content",
    "Function",
    "Piece",
    "forced_calls",
    "format_named",
    "format_names",
    "format_of",
]
