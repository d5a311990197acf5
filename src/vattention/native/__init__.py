"""Compiled kernels in plain C, built with the package where there is a C compiler and called through ctypes.

Nothing here is needed for correct results: callers ask for the library first and have a way without it.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import logging
from array import array
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vattention.native.huge import huge_empty
from vattention.native.structures import (
    CACHE_DTYPES,
    DTYPES,
    AttentionCache,
    AttentionHeads,
    Batch,
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
    address_of,
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

Largest = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Of rows: where each one's first largest number is, and that number; NaN counts as largest."""

_LETTERS = {"p": c_void_p, "q": c_int64, "i": c_int32, "f": c_float}


def _function(library: ctypes.CDLL, name: str, result: type | None, arguments: str) -> Callable[..., Any]:
    """A C function, with a letter for each argument: p for a pointer, q and i for integers of 64 and 32 bits, f."""
    function: Any = getattr(library, f"vattention_{name}")
    function.restype = result
    function.argtypes = tuple(_LETTERS[letter] for letter in arguments)
    return function  # type: ignore[no-any-return]


class Workspace:
    """Memory that a model's layers work in, one after the other, kept for the next batch."""

    def __init__(self) -> None:
        self._memory = huge_empty(0, torch.uint8)
        self._nbytes = 0

    def address(self, nbytes: int) -> int:
        """Of so many bytes, from a cache line on; good until the next call."""
        if self._nbytes < nbytes:
            self._memory, self._nbytes = huge_empty(nbytes, torch.uint8), nbytes
        return self._memory.data_ptr()


class Kernels:
    """The compiled kernels on tensors, and the threads they run on, which are torch's.

    All tensors are in processor memory, of float32 or bfloat16, and of one type unless said otherwise; what else
    the C functions ask for is up to the caller.
    """

    dtypes = frozenset(DTYPES)
    cache_dtypes = frozenset(CACHE_DTYPES)

    def __init__(self, path: Path) -> None:
        """Loads the library; raises OSError or AttributeError where it, or GNU OpenMP under torch, is not there."""
        library = ctypes.CDLL(str(path))
        self._parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p)
        self._linear = _function(library, "linear", c_int32, "ppqqpiip")
        self._largest = _function(library, "largest", c_int32, "ppqpqqpppip")
        self._largest_of = _function(library, "largest_of", c_int32, "pqqqpppip")
        self.has_tiles = _function(library, "has_tiles", c_int32, "")() == 2
        """Whether the processor multiplies whole tiles of bfloat16, and the system lets it."""
        self.can_screen = bool(_function(library, "can_screen", c_int32, "")())
        self._screen_pack = _function(library, "screen_pack", c_int32, "ppip")
        self._screened_largest = _function(library, "screened_largest", c_int32, "pppqqpppip")
        self._rms_norm = _function(library, "rms_norm", None, "pppqqfiip")
        self._rotate = _function(library, "rotate", None, "ppppqip")
        self._gate = _function(library, "gate", None, "ppqqffiip")
        self._attend = _function(library, "attend", c_int32, "ppppipqqpqppip")
        self._can_prefill = _function(library, "can_prefill", c_int32, "pi")
        self._prefill_nbytes = _function(library, "prefill_nbytes", c_int64, "ppqi")
        self._prefill = _function(library, "prefill", None, "pppppqqpqppip")
        self._embed = _function(library, "embed", c_int32, "ppqpip")
        self._layer_nbytes = _function(library, "layer_nbytes", c_int64, "ppi")
        self._stack_nbytes = _function(library, "stack_nbytes", c_int64, "pqppi")
        self._layer = _function(library, "layer_forward", c_int32, "ppppppppip")
        self._stack = _function(library, "stack_forward", c_int32, "pqppppip")

    def linear(self, weight: LinearWeight, x: Tensor, y: Tensor) -> None:
        """y[rows, out] = x[rows, in] W^T + b; one row or more, y and rows of x contiguous.

        x is of the weight's type, y of that or of float32.
        """
        status = self._linear(
            ctypes.addressof(weight),
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            y.data_ptr(),
            DTYPES[y.dtype],
            torch.get_num_threads(),
            self._parallel,
        )
        if status != 0:
            raise MemoryError(f"no memory for the workspace of a product of {x.shape[0]} rows")

    def largest(self, weight: LinearWeight, x: Tensor, noise: Noise | None = None) -> Largest:
        """Each row's first largest number of x[rows, in] W^T + b, NaN counting as largest: its column and itself.

        Args:
            x: one row or more, each contiguous.
            noise: of each row, added to its numbers before they are compared.
        """
        largest, _ = self._find_largest(self._largest, (ctypes.addressof(weight), None, 0), x, (x.shape[0],), noise)
        return largest

    def screened_largest(
        self, weight: LinearWeight, screen: ScreenCopy, x: Tensor, noise: Noise | None = None
    ) -> tuple[Largest, bool]:
        """The same by way of the weight's screen, without a bias; and whether the screen spared any work."""
        addresses = ctypes.addressof(screen), ctypes.addressof(weight)
        largest, status = self._find_largest(self._screened_largest, addresses, x, (x.shape[0],), noise)
        return largest, status == 0

    def largest_of(self, y: Tensor, noise: Noise | None = None) -> Largest:
        """The same of numbers that are there: float32 y[rows, columns], each row contiguous."""
        largest, _ = self._find_largest(self._largest_of, (), y, y.shape, noise)
        return largest

    def _find_largest(
        self,
        call: Callable[..., int],
        first: tuple[Any, ...],
        x: Tensor,
        shape: tuple[int, ...],
        noise: Noise | None,
    ) -> tuple[Largest, int]:
        columns, values = array("q", bytes(8 * x.shape[0])), array("f", bytes(4 * x.shape[0]))
        status = call(
            *first,
            x.data_ptr(),
            x.stride(0),
            *shape,
            None if noise is None else noise.ctypes.data,
            address_of(columns),
            address_of(values),
            torch.get_num_threads(),
            self._parallel,
        )
        if status < 0:
            raise MemoryError(f"no memory for the workspace of a product of {x.shape[0]} rows")
        return (np.frombuffer(columns, np.int64), np.frombuffer(values, np.float32)), status

    def screen(self, screen: ScreenCopy, weight: LinearWeight) -> bool:
        """Fills in the copy of a bfloat16 weight; whether all its numbers are finite, and the copy can be used."""
        status = self._screen_pack(
            ctypes.addressof(screen), ctypes.addressof(weight), torch.get_num_threads(), self._parallel
        )
        return bool(status == 0)

    def rms_norm(self, x: Tensor, scale: Tensor, epsilon: float, y: Tensor) -> None:
        """y = x / sqrt(mean(x^2) + epsilon) * scale over rows of scale's length, dense, in the order of memory.

        scale is float32 whatever x is.
        """
        self._rms_norm(
            x.data_ptr(),
            scale.data_ptr(),
            y.data_ptr(),
            x.numel() // scale.numel(),
            scale.numel(),
            epsilon,
            DTYPES[x.dtype],
            torch.get_num_threads(),
            self._parallel,
        )

    def rotate(self, rotation: Rotation, x: Tensor, cosines: Tensor, sines: Tensor) -> None:
        """In place: normalises and rotates the query and key heads of contiguous x[tokens, width].

        cosines and sines are contiguous [tokens, head_dim], of x's type.
        """
        self._rotate(
            ctypes.addressof(rotation),
            x.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            x.shape[0],
            torch.get_num_threads(),
            self._parallel,
        )

    def gate(self, gate_up: Tensor, linear: float, cubic: float, y: Tensor) -> None:
        """y[rows, n] = f(g) u of contiguous gate_up[rows, 2n] = (g, u); f(x) = x sigmoid(x (linear + cubic x²))."""
        rows, width = y.shape
        self._gate(
            gate_up.data_ptr(),
            y.data_ptr(),
            rows,
            width,
            linear,
            cubic,
            DTYPES[y.dtype],
            torch.get_num_threads(),
            self._parallel,
        )

    def attend(
        self,
        heads: AttentionHeads,
        cache: AttentionCache,
        query: Tensor,
        spans: Int64s,
        sinks: Tensor | None,
        output: Tensor,
    ) -> None:
        """output[T, num_heads, value_dim], the spans' rows of it, from query[T, num_heads, key_dim].

        Args:
            query: of the cache's type, with adjacent numbers in each head.
            spans: of each slot, first row, number of rows, position of the first.
            sinks: [num_heads] contiguous float32.
            output: contiguous, of the cache's type, or float32 where that is float16.
        """
        status = self._attend(
            ctypes.addressof(heads),
            *cache.addresses,
            cache.dtype,
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            address_of(spans),
            len(spans) // 4,
            None if sinks is None else sinks.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
            self._parallel,
        )
        if status != 0:
            raise MemoryError(f"no memory for the workspace of attention over {query.shape[0]} rows")

    @staticmethod
    def number_type(dtype: torch.dtype) -> int:
        """What the compiled code calls a type."""
        return DTYPES[dtype]

    def can_prefill(self, heads: AttentionHeads, dtype: torch.dtype) -> bool:
        """Whether `prefill`, and so `layer` and `stack` with long spans, compute such heads over such a cache."""
        return dtype in DTYPES and bool(self._can_prefill(ctypes.addressof(heads), DTYPES[dtype]))

    def prefill(
        self, heads: AttentionHeads, cache: AttentionCache, query: Tensor, spans: Int64s, output: Tensor
    ) -> None:
        """As `attend`, for spans of many rows and heads without sinks that it can compute.

        Args:
            query: with adjacent numbers in each head.
            output: contiguous.
        """
        address, num_threads = ctypes.addressof(heads), torch.get_num_threads()
        workspace = Workspace()
        where = address_of(spans), len(spans) // 4
        nbytes = self._prefill_nbytes(address, *where, num_threads)
        self._prefill(
            address,
            *cache.addresses,
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            *where,
            output.data_ptr(),
            workspace.address(nbytes),
            num_threads,
            self._parallel,
        )

    def embed(self, rows: EmbeddingRows, token_ids: Int64s, x: Tensor) -> None:
        """x[len(token_ids), width], contiguous and of the rows' type, the tokens' rows."""
        status = self._embed(
            ctypes.addressof(rows),
            address_of(token_ids),
            len(token_ids),
            x.data_ptr(),
            torch.get_num_threads(),
            self._parallel,
        )
        if status != 0:
            raise IndexError(f"a token id is not among the {rows.num} of the embedding")

    def layer(
        self,
        layer: DecoderLayer,
        cache: AttentionCache,
        short: Int64s,
        long: Int64s,
        cosines: Tensor,
        sines: Tensor,
        workspace: Workspace,
        x: Tensor,
    ) -> None:
        """x[tokens, hidden] through a decoder layer, in place; stores the tokens' keys and values.

        Args:
            short, long: spans of one row and of more, as in `attend`.
            cosines, sines: contiguous [tokens, head_dim], of x's type.
        """
        batch, num_threads = Batch.of(x.shape[0], short, long), torch.get_num_threads()
        address = ctypes.addressof(layer)
        batch.workspace = workspace.address(self._layer_nbytes(address, ctypes.addressof(batch), num_threads))
        status = self._layer(
            address,
            *cache.addresses,
            ctypes.addressof(batch),
            cosines.data_ptr(),
            sines.data_ptr(),
            x.data_ptr(),
            num_threads,
            self._parallel,
        )
        if status != 0:
            raise MemoryError(f"no memory for the workspace of a layer of {x.shape[0]} rows")

    def stack(
        self,
        layers: ctypes.Array[StackedLayer],
        norm: Norm,
        short: Int64s,
        long: Int64s,
        rotaries: Rotaries,
        workspace: Workspace,
        x: Tensor,
        wanted: Int64s | None = None,
    ) -> None:
        """x[tokens, hidden] through all decoder layers and the norm behind them, in place, as `layer` does.

        Args:
            rotaries: of the layers' type, as far as the batch's positions go.
            wanted: the rows to compute to the end, in ascending order; they come first in x then,
                and the rest of it means nothing. None for all.
        """
        batch, num_threads = Batch.of(x.shape[0], short, long, wanted), torch.get_num_threads()
        address, tables = ctypes.addressof(layers), ctypes.addressof(rotaries)
        nbytes = self._stack_nbytes(address, len(layers), tables, ctypes.addressof(batch), num_threads)
        batch.workspace = workspace.address(nbytes)
        status = self._stack(
            address,
            len(layers),
            ctypes.addressof(norm),
            ctypes.addressof(batch),
            tables,
            x.data_ptr(),
            num_threads,
            self._parallel,
        )
        if status != 0:
            raise MemoryError(f"no memory for the workspace of layers of {x.shape[0]} rows")


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
