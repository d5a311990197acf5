"""Attention over a KV cache, for decoding and for prompts."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64

import torch
from torch import Tensor

from vattention.native.huge import Workspace
from vattention.native.library import Library
from vattention.native.structures import DTYPES, AttentionCache, AttentionHeads, Int64s, address_of


class Attention:
    """attend.c and prefill.c on tensors."""

    def __init__(self, library: Library) -> None:
        self._parallel = library.parallel
        self._attend = library.function("attend", c_int32, "ppppipqqpqppip")
        self._can_prefill = library.function("can_prefill", c_int32, "pi")
        self._prefill_nbytes = library.function("prefill_nbytes", c_int64, "ppqi")
        self._prefill = library.function("prefill", None, "pppppqqpqppip")

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
