"""Compiled kernels in plain C, built with the package where there is a C compiler and called through ctypes.

Nothing here is needed for correct results: callers ask for the library first and have a way without it.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import logging
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vattention.native.huge import huge_empty

_log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_CACHE_DTYPES = {**_DTYPES, torch.float16: 2}

Largest = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Of rows: where each one's first largest number is, and that number; NaN counts as largest."""


class WeightFormat(IntEnum):
    """How a weight is packed: numbers of its own type as linear.c describes them, or as quantized.c does."""

    PLAIN = 0
    INT8 = 1
    INT4 = 2


class LinearWeight(ctypes.Structure):
    """`vattention_weight` of linear.c: a packed weight and a bias, both kept alive by who made this."""

    _fields_ = (
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("num_out", c_int64),
        ("num_in", c_int64),
        ("dtype", c_int32),
        ("format", c_int32),
    )

    @classmethod
    def of(
        cls,
        packed: Tensor,
        bias: Tensor | None,
        num_out: int,
        num_in: int,
        dtype: torch.dtype,
        form: WeightFormat,
    ) -> LinearWeight:
        """Panels, and a float32 bias padded to whole panels; x is of `dtype`."""
        bias_address = None if bias is None else bias.data_ptr()
        return cls(packed.data_ptr(), bias_address, num_out, num_in, _DTYPES[dtype], form)


class ScreenCopy(ctypes.Structure):
    """`vattention_screen` of screen.c: tensors kept alive by who made this."""

    _fields_ = (
        ("numbers", c_void_p),
        ("scales", c_void_p),
        ("errors", c_void_p),
        ("sums", c_void_p),
        ("num_out", c_int64),
        ("num_steps", c_int64),
    )


class AttentionHeads(ctypes.Structure):
    """`vattention_heads` of attend.c: what a layer's attention computes."""

    _fields_ = (
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("key_dim", c_int64),
        ("value_dim", c_int64),
        ("window", c_int64),
        ("strip", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
    )


class _Cache(ctypes.Structure):
    """`vattention_cache` of attend.c: keys or values."""

    _fields_ = (
        ("numbers", c_void_p),
        ("slot_stride", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
    )


class _Tables(ctypes.Structure):
    """`vattention_tables` of attend.c: block tables, or none."""

    _fields_ = (("blocks", c_void_p), ("slot_stride", c_int64), ("block_size", c_int64))


class AttentionCache:
    """One layer's keys and values as attend.c takes them; the tensors stay alive as long as this.

    Args:
        keys: [num_slots, max_len, num_kv_heads, key_dim], or with tables [num_blocks, block_size, ...].
        values: likewise, of value_dim.
        tables: [num_slots, max_blocks] int32.
    """

    def __init__(self, keys: Tensor, values: Tensor, tables: Tensor | None) -> None:
        self._tensors = keys, values, tables
        self._keys = _Cache(keys.data_ptr(), *keys.stride()[:3])
        self._values = _Cache(values.data_ptr(), *values.stride()[:3])
        self._tables = _Tables() if tables is None else _Tables(tables.data_ptr(), tables.stride(0), keys.shape[1])
        self.dtype = _CACHE_DTYPES[keys.dtype]
        self.addresses = tuple(ctypes.addressof(part) for part in (self._keys, self._values, self._tables))


class NormedHeads(ctypes.Structure):
    """`vattention_normed_heads` of rotate.c: heads side by side, and how each is normalised."""

    _fields_ = (("scale", c_void_p), ("epsilon", c_float), ("num_heads", c_int32))

    @classmethod
    def of(cls, num_heads: int, scale: Tensor | None, epsilon: float) -> NormedHeads:
        """`scale` is float32 [head_dim], kept alive by who made this; None for heads that stay as they are."""
        return cls(None if scale is None else scale.data_ptr(), epsilon, num_heads)


class Rotation(ctypes.Structure):
    """`vattention_rotation` of rotate.c: what a token's queries and keys look like."""

    _fields_ = (
        ("query", NormedHeads),
        ("key", NormedHeads),
        ("head_dim", c_int64),
        ("width", c_int64),
        ("dtype", c_int32),
    )

    @classmethod
    def of(cls, query: NormedHeads, key: NormedHeads, head_dim: int, width: int, dtype: torch.dtype) -> Rotation:
        return cls(query, key, head_dim, width, _DTYPES[dtype])


class Norm(ctypes.Structure):
    """`vattention_norm` of layer.c."""

    _fields_ = (("scale", c_void_p), ("epsilon", c_float))

    @classmethod
    def of(cls, scale: Tensor | None, epsilon: float) -> Norm:
        """`scale` is float32 [hidden], kept alive by who made this; None for no norm."""
        return cls(None if scale is None else scale.data_ptr(), epsilon)


class DecoderLayer(ctypes.Structure):
    """`vattention_layer` of layer.c; what its pointers point to is kept alive by who made this."""

    _fields_ = (
        ("query_key_value", c_void_p),
        ("attention_out", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("rotation", c_void_p),
        ("heads", c_void_p),
        ("before_attention", Norm),
        ("after_attention", Norm),
        ("before_mlp", Norm),
        ("after_mlp", Norm),
        ("gate_linear", c_float),
        ("gate_cubic", c_float),
        ("hidden", c_int64),
        ("dtype", c_int32),
    )


class StackedLayer(ctypes.Structure):
    """`vattention_stacked` of stack.c: a layer over its cache, and which cosines and sines it takes."""

    _fields_ = (
        ("layer", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("tables", c_void_p),
        ("rotary", c_int64),
    )

    @classmethod
    def of(cls, layer: DecoderLayer, cache: AttentionCache, rotary: int) -> StackedLayer:
        """Both are kept alive by who made this."""
        return cls(ctypes.addressof(layer), *cache.addresses, rotary)


class _Rotary(ctypes.Structure):
    """`vattention_rotary` of stack.c."""

    _fields_ = (("cosines", c_void_p), ("sines", c_void_p))


class _Batch(ctypes.Structure):
    """`vattention_batch` of layer.c."""

    _fields_ = (
        ("num_tokens", c_int64),
        ("short_spans", c_void_p),
        ("long_spans", c_void_p),
        ("num_short", c_int64),
        ("num_long", c_int64),
        ("workspace", c_void_p),
    )

    @classmethod
    def of(cls, num_tokens: int, short: Tensor, long: Tensor) -> _Batch:
        return cls(num_tokens, short.data_ptr(), long.data_ptr(), len(short), len(long), None)


class Workspace:
    """Memory that a model's layers work in, one after the other, kept for the next batch."""

    def __init__(self) -> None:
        self._memory = huge_empty(0, torch.uint8)

    def address(self, nbytes: int) -> int:
        """Of so many bytes, from a cache line on; good until the next call."""
        if len(self._memory) < nbytes:
            self._memory = huge_empty(nbytes, torch.uint8)
        return self._memory.data_ptr()


class Kernels:
    """The compiled kernels on tensors, and the threads they run on, which are torch's.

    All tensors are in processor memory, of float32 or bfloat16, and of one type unless said otherwise; what else
    the C functions ask for is up to the caller.
    """

    dtypes = frozenset(_DTYPES)
    cache_dtypes = frozenset(_CACHE_DTYPES)

    def __init__(self, path: Path) -> None:
        """Loads the library; raises OSError or AttributeError where it, or GNU OpenMP under torch, is not there."""
        library = ctypes.CDLL(str(path))
        self._parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p)
        self._linear = library.vattention_linear
        self._linear.restype = c_int32
        self._linear.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32, c_int32, c_void_p)
        self._largest = library.vattention_largest
        self._largest.restype = c_int32
        self._largest.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64),
            *(c_void_p, c_void_p, c_int32, c_void_p),
        )
        library.vattention_can_screen.restype = c_int32
        library.vattention_can_screen.argtypes = ()
        self.can_screen = bool(library.vattention_can_screen())
        self._screen_pack = library.vattention_screen_pack
        self._screen_pack.restype = c_int32
        self._screen_pack.argtypes = (c_void_p, c_void_p, c_int32, c_void_p)
        self._screened_largest = library.vattention_screened_largest
        self._screened_largest.restype = c_int32
        self._screened_largest.argtypes = (
            *(c_void_p, c_void_p, c_void_p, c_int64, c_int64),
            *(c_void_p, c_void_p, c_int32, c_void_p),
        )
        self._rms_norm = library.vattention_rms_norm
        self._rms_norm.restype = None
        self._rms_norm.argtypes = (
            *(c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float),
            *(c_int32, c_int32, c_void_p),
        )
        self._rotate = library.vattention_rotate
        self._rotate.restype = None
        self._rotate.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int32, c_void_p)
        self._gate = library.vattention_gate
        self._gate.restype = None
        self._gate.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_int64, c_float, c_float),
            *(c_int32, c_int32, c_void_p),
        )

        self._attend = library.vattention_attend
        self._attend.restype = c_int32
        self._attend.argtypes = (
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_int64, c_int64),
            *(c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_void_p),
        )

        self._can_prefill = library.vattention_can_prefill
        self._can_prefill.restype = c_int32
        self._can_prefill.argtypes = (c_void_p, c_int32)
        self._layer_nbytes = library.vattention_layer_nbytes
        self._layer_nbytes.restype = c_int64
        self._layer_nbytes.argtypes = (c_void_p, c_void_p, c_int32)
        self._stack_nbytes = library.vattention_stack_nbytes
        self._stack_nbytes.restype = c_int64
        self._stack_nbytes.argtypes = (c_void_p, c_int64, c_void_p, c_int32)
        self._layer = library.vattention_layer_forward
        self._layer.restype = c_int32
        self._layer.argtypes = (*(c_void_p,) * 8, c_int32, c_void_p)
        self._stack = library.vattention_stack_forward
        self._stack.restype = c_int32
        self._stack.argtypes = (c_void_p, c_int64, *(c_void_p,) * 4, c_int32, c_void_p)

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
            _DTYPES[y.dtype],
            torch.get_num_threads(),
            self._parallel,
        )
        if status != 0:
            raise MemoryError(f"no memory for the workspace of a product of {x.shape[0]} rows")

    def largest(self, weight: LinearWeight, x: Tensor) -> Largest:
        """Each row's first largest number of x[rows, in] W^T + b, NaN counting as largest: its column and itself.

        x has one row or more, each contiguous.
        """
        largest, _ = self._find_largest(self._largest, (ctypes.addressof(weight), None, 0), x)
        return largest

    def screened_largest(self, weight: LinearWeight, screen: ScreenCopy, x: Tensor) -> tuple[Largest, bool]:
        """The same by way of the weight's screen, without a bias; and whether the screen spared any work."""
        addresses = ctypes.addressof(screen), ctypes.addressof(weight)
        largest, status = self._find_largest(self._screened_largest, addresses, x)
        return largest, status == 0

    def _find_largest(self, call: Callable[..., int], first: tuple[Any, ...], x: Tensor) -> tuple[Largest, int]:
        columns, values = np.empty(x.shape[0], np.int64), np.empty(x.shape[0], np.float32)
        status = call(
            *first,
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            columns.ctypes.data,
            values.ctypes.data,
            torch.get_num_threads(),
            self._parallel,
        )
        if status < 0:
            raise MemoryError(f"no memory for the workspace of a product of {x.shape[0]} rows")
        return (columns, values), status

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
            _DTYPES[x.dtype],
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
            _DTYPES[y.dtype],
            torch.get_num_threads(),
            self._parallel,
        )

    def attend(
        self,
        heads: AttentionHeads,
        cache: AttentionCache,
        query: Tensor,
        spans: Tensor,
        sinks: Tensor | None,
        output: Tensor,
    ) -> None:
        """output[T, num_heads, value_dim], the spans' rows of it, from query[T, num_heads, key_dim].

        Args:
            query: of the cache's type, with adjacent numbers in each head.
            spans: [num_spans, 4] contiguous int64: slot, first row, number of rows, position of the first.
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
            spans.data_ptr(),
            spans.shape[0],
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
        return _DTYPES[dtype]

    def can_prefill(self, heads: AttentionHeads, dtype: torch.dtype) -> bool:
        """Whether `layer` and `stack` take spans of more than one row over a cache of this type."""
        return dtype in _DTYPES and bool(self._can_prefill(ctypes.addressof(heads), _DTYPES[dtype]))

    def layer(
        self,
        layer: DecoderLayer,
        cache: AttentionCache,
        short: Tensor,
        long: Tensor,
        cosines: Tensor,
        sines: Tensor,
        workspace: Workspace,
        x: Tensor,
    ) -> None:
        """x[tokens, hidden] through a decoder layer, in place; stores the tokens' keys and values.

        Args:
            short, long: spans of one row and of more, [n, 4] contiguous int64: slot, first row, number of rows,
                position of the first.
            cosines, sines: contiguous [tokens, head_dim], of x's type.
        """
        batch, num_threads = _Batch.of(x.shape[0], short, long), torch.get_num_threads()
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
        short: Tensor,
        long: Tensor,
        rotaries: Sequence[tuple[Tensor, Tensor]],
        workspace: Workspace,
        x: Tensor,
    ) -> None:
        """x[tokens, hidden] through all decoder layers and the norm behind them, in place, as `layer` does.

        Args:
            rotaries: cosines and sines, by the number that layers have.
        """
        batch, num_threads = _Batch.of(x.shape[0], short, long), torch.get_num_threads()
        address = ctypes.addressof(layers)
        nbytes = self._stack_nbytes(address, len(layers), ctypes.addressof(batch), num_threads)
        batch.workspace = workspace.address(nbytes)
        pairs = (_Rotary * len(rotaries))(*((one.data_ptr(), other.data_ptr()) for one, other in rotaries))
        status = self._stack(
            address,
            len(layers),
            ctypes.addressof(norm),
            ctypes.addressof(batch),
            ctypes.addressof(pairs),
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
