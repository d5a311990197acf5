"""Compiled kernels in plain C, built with the package where there is a C compiler and called through ctypes.

Nothing here is needed for correct results: whoever calls asks for the library first and has a way without it.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import logging
from functools import cache
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent


class LinearWeight(ctypes.Structure):
    """`vattention_weight` of linear.c: a packed weight and where its bias is."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_out", ctypes.c_int64),
        ("num_in", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class LinearLibrary:
    """The functions of linear.c, and the thread pool they run on, which is torch's."""

    dtypes = {torch.float32: 0, torch.bfloat16: 1}

    def __init__(self, path: Path) -> None:
        """Raises OSError or AttributeError where the library, or torch's GNU OpenMP runtime, is not there."""
        library = ctypes.CDLL(str(path))
        self._parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
        self._linear = library.vattention_linear
        self._linear.restype = ctypes.c_int32
        self._linear.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_void_p,
        )
        self.supported = bool(library.vattention_linear_supported())

    def linear(self, weight: LinearWeight, x: torch.Tensor, y: torch.Tensor) -> None:
        """y[rows, out] = x[rows, in] W^T + b; see linear.c for what x and y must be."""
        status = self._linear(
            ctypes.addressof(weight),
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            y.data_ptr(),
            torch.get_num_threads(),
            self._parallel,
        )
        if status != 0:
            raise MemoryError(f"no memory for the workspace of a product of {x.shape[0]} rows")


@cache
def linear_library() -> LinearLibrary | None:
    """The library for linear layers, or None where it was not built or this machine cannot run it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = FOLDER / f"_linear{suffix}"
        if not path.exists():
            continue
        try:
            library = LinearLibrary(path)
        except (OSError, AttributeError) as error:
            _log.warning("the compiled linear kernel cannot be used: %s", error)
            return None
        return library if library.supported else None
    _log.info("the package was built without a C compiler: linear layers run on torch's kernels alone")
    return None
