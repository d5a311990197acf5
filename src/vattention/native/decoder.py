"""Whole decoder layers, and all of a model's."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64

import torch
from torch import Tensor

from vattention.native.huge import Workspace
from vattention.native.library import Library
from vattention.native.structures import (
    AttentionCache,
    Batch,
    DecoderLayer,
    Int64s,
    Norm,
    Rotaries,
    StackedLayer,
)


class Decoder:
    """layer.c and stack.c on tensors."""

    def __init__(self, library: Library) -> None:
        self._parallel = library.parallel
        self._layer_nbytes = library.function("layer_nbytes", c_int64, "ppi")
        self._stack_nbytes = library.function("stack_nbytes", c_int64, "pqppi")
        self._layer = library.function("layer_forward", c_int32, "ppppppppip")
        self._stack = library.function("stack_forward", c_int32, "pqppppip")

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
