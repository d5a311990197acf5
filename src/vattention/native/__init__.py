"""Compiled kernels in plain C, built with the package where there is a C compiler and called through ctypes.

Nothing here is needed for correct results: callers ask for the library first and have a way without it.
"""

from __future__ import annotations

import importlib.machinery
import logging
from functools import cache
from pathlib import Path

import torch

from vattention.native.attention import Attention
from vattention.native.decoder import Decoder
from vattention.native.huge import Workspace
from vattention.native.library import Library
from vattention.native.products import Largest, Products
from vattention.native.rowwise import Rowwise
from vattention.native.structures import (
    CACHE_DTYPES,
    DTYPES,
    AttentionCache,
    AttentionHeads,
    DecoderLayer,
    EmbeddingRows,
    Int64s,
    LinearWeight,
    Noise,
    Norm,
    NormedHeads,
    Rotaries,
    Rotation,
    ScreenCopy,
    StackedLayer,
    WeightFormat,
    int64s,
)

__all__ = [
    "FOLDER",
    "AttentionCache",
    "AttentionHeads",
    "DecoderLayer",
    "EmbeddingRows",
    "Int64s",
    "Kernels",
    "Largest",
    "LinearWeight",
    "Noise",
    "Norm",
    "NormedHeads",
    "Rotaries",
    "Rotation",
    "ScreenCopy",
    "StackedLayer",
    "WeightFormat",
    "Workspace",
    "int64s",
    "kernels",
]

_log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent


class Kernels:
    """The compiled kernels on tensors.

    All tensors are in processor memory, of float32 or bfloat16, and of one type unless said otherwise; what else
    the C functions ask for is up to the caller.
    """

    dtypes = frozenset(DTYPES)
    cache_dtypes = frozenset(CACHE_DTYPES)

    def __init__(self, path: Path) -> None:
        """Loads the library; raises OSError or AttributeError where it, or GNU OpenMP under torch, is not there."""
        library = Library(path)
        self.products = Products(library)
        self.rowwise = Rowwise(library)
        self.attention = Attention(library)
        self.decoder = Decoder(library)

    @staticmethod
    def number_type(dtype: torch.dtype) -> int:
        """What the compiled code calls a type."""
        return DTYPES[dtype]


@cache
def kernels() -> Kernels | None:
    """The kernels, or None where they were not built or cannot be loaded."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = FOLDER / f"_kernels{suffix}"
        if not path.exists():
            continue
        try:
            return Kernels(path)
        except (OSError, AttributeError) as error:
            _log.warning("the compiled kernels cannot be used: %s", error)
            return None
    _log.warning("the package was built without a C compiler: models on processors run on torch's slower kernels")
    return None
