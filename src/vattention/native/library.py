"""The compiled library: its functions, and the threads they run on, which are torch's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

_LETTERS = {"p": c_void_p, "q": c_int64, "i": c_int32, "f": c_float}


class Library:
    """Functions by name; OSError or AttributeError where the library, or GNU OpenMP under torch, is not there.

    Attributes:
        parallel: what functions take to run on torch's threads.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p)

    def function(self, name: str, result: type | None, arguments: str) -> Callable[..., Any]:
        """One, with a letter for each argument: p for a pointer, q and i for integers of 64 and 32 bits, f."""
        function: Any = getattr(self._library, f"vattention_{name}")
        function.restype = result
        function.argtypes = tuple(_LETTERS[letter] for letter in arguments)
        return function  # type: ignore[no-any-return]
