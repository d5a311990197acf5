"""What the compiled kernels take, as kernels.h declares it; whoever makes one keeps the tensors behind it alive."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
CACHE_DTYPES = {**DTYPES, torch.float16: 2}

Int64s: TypeAlias = "array[int]"
"""Numbers of 64 bits, side by side: what changes with each step comes so, for a tensor takes longer to make."""


def int64s(numbers: Iterable[int]) -> Int64s:
    return array("q", numbers)


def address_of(numbers: array[int] | array[float]) -> int:
    """Good as long as the numbers."""
    return numbers.buffer_info()[0]


class WeightFormat(IntEnum):
    """How a weight is packed: numbers of its own type as linear.c describes them, or as quantized.c does."""

    PLAIN = 0
    INT8 = 1
    INT4 = 2
    HALVES = 3


class LinearWeight(ctypes.Structure):
    """`vattention_weight` of kernels.h: a packed weight and a bias, both kept alive by who made this."""

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
        return cls(packed.data_ptr(), bias_address, num_out, num_in, DTYPES[dtype], form)


NOISE = np.dtype([("key", np.uint64), ("temperature", np.float32)], align=True)
"""`vattention_noise` of kernels.h: what noise a row of numbers gets; none at temperature 0."""

Noise = NDArray[np.void]
"""[rows] of `NOISE`."""


class ScreenCopy(ctypes.Structure):
    """`vattention_screen` of kernels.h: tensors kept alive by who made this."""

    _fields_ = (
        ("numbers", c_void_p),
        ("scales", c_void_p),
        ("errors", c_void_p),
        ("sums", c_void_p),
        ("num_out", c_int64),
        ("num_steps", c_int64),
    )


class EmbeddingRows(ctypes.Structure):
    """`vattention_embedding` of embed.c; what its pointers point to is kept alive by who made this.

    `factor` is 1 until it is set.
    """

    _fields_ = (
        ("table", c_void_p),
        ("packed", c_void_p),
        ("num", c_int64),
        ("width", c_int64),
        ("factor", c_float),
        ("dtype", c_int32),
    )

    @classmethod
    def of_table(cls, table: Tensor) -> EmbeddingRows:
        """Rows of a contiguous table [num, width]."""
        return cls(table.data_ptr(), None, *table.shape, 1.0, DTYPES[table.dtype])

    @classmethod
    def of_packed(cls, weight: LinearWeight) -> EmbeddingRows:
        """Outputs of a quantized weight."""
        return cls(None, ctypes.addressof(weight), weight.num_out, weight.num_in, 1.0, weight.dtype)


class AttentionHeads(ctypes.Structure):
    """`vattention_heads` of kernels.h: what a layer's attention computes."""

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
    """`vattention_cache` of kernels.h: keys or values."""

    _fields_ = (
        ("numbers", c_void_p),
        ("slot_stride", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
    )


class _Tables(ctypes.Structure):
    """`vattention_tables` of kernels.h: block tables, or none."""

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
        self.dtype = CACHE_DTYPES[keys.dtype]
        self.addresses = tuple(ctypes.addressof(part) for part in (self._keys, self._values, self._tables))


class NormedHeads(ctypes.Structure):
    """`vattention_normed_heads` of kernels.h: heads side by side, and how each is normalised."""

    _fields_ = (("scale", c_void_p), ("epsilon", c_float), ("num_heads", c_int32))

    @classmethod
    def of(cls, num_heads: int, scale: Tensor | None, epsilon: float) -> NormedHeads:
        """`scale` is float32 [head_dim], kept alive by who made this; None for heads that stay as they are."""
        return cls(None if scale is None else scale.data_ptr(), epsilon, num_heads)


class Rotation(ctypes.Structure):
    """`vattention_rotation` of kernels.h: what a token's queries and keys look like."""

    _fields_ = (
        ("query", NormedHeads),
        ("key", NormedHeads),
        ("head_dim", c_int64),
        ("width", c_int64),
        ("dtype", c_int32),
    )

    @classmethod
    def of(cls, query: NormedHeads, key: NormedHeads, head_dim: int, width: int, dtype: torch.dtype) -> Rotation:
        return cls(query, key, head_dim, width, DTYPES[dtype])


class Norm(ctypes.Structure):
    """`vattention_norm` of kernels.h."""

    _fields_ = (("scale", c_void_p), ("epsilon", c_float))

    @classmethod
    def of(cls, scale: Tensor | None, epsilon: float) -> Norm:
        """`scale` is float32 [hidden], kept alive by who made this; None for no norm."""
        return cls(None if scale is None else scale.data_ptr(), epsilon)


class DecoderLayer(ctypes.Structure):
    """`vattention_layer` of kernels.h; what its pointers point to is kept alive by who made this."""

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


class Rotaries(ctypes.Structure):
    """`vattention_rotaries` of stack.c: cosines and sines of positions; the tensors stay alive as long as this."""

    _fields_ = (("tables", c_void_p), ("num_tables", c_int64), ("row_nbytes", c_int64))

    @classmethod
    def of(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> Rotaries:
        """Contiguous tables [positions, head_dim] of one size and type, by the number that layers have."""
        tables = (_Rotary * len(pairs))(*(_Rotary(one.data_ptr(), other.data_ptr()) for one, other in pairs))
        made = cls(ctypes.addressof(tables), len(pairs), pairs[0][0][0].nbytes)
        made._alive = tables, pairs
        return made


class Batch(ctypes.Structure):
    """`vattention_batch` of kernels.h."""

    _fields_ = (
        ("num_tokens", c_int64),
        ("short_spans", c_void_p),
        ("long_spans", c_void_p),
        ("num_short", c_int64),
        ("num_long", c_int64),
        ("wanted", c_void_p),
        ("num_wanted", c_int64),
        ("workspace", c_void_p),
    )

    @classmethod
    def of(cls, num_tokens: int, short: Int64s, long: Int64s, wanted: Int64s | None = None) -> Batch:
        """Spans of four numbers each; all kept alive by who made this."""
        spans = address_of(short), address_of(long), len(short) // 4, len(long) // 4
        rows = (None, -1) if wanted is None else (address_of(wanted), len(wanted))
        return cls(num_tokens, *spans, *rows, None)
