"""What is computed of each row by itself: norms, rotary embeddings, gates, and rows that are looked up."""

from __future__ import annotations

import ctypes
from ctypes import c_int32
from typing import ClassVar

import torch
from torch import Tensor

from vattention.native.library import Library
from vattention.native.structures import DTYPES, EmbeddingRows, Int64s, NormedHeads, Rotation, address_of


class Rowwise:
    """norm.c, rotate.c, gate.c and embed.c on tensors."""

    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(DTYPES)
    device_type: ClassVar[str] = "cpu"

    def __init__(self, library: Library) -> None:
        self._parallel = library.parallel
        self._rms_norm = library.function("rms_norm", None, "pppqqfiip")
        self._rotate = library.function("rotate", None, "ppppqip")
        self._gate = library.function("gate", None, "ppqqffiip")
        self._embed = library.function("embed", c_int32, "ppqpip")

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

    def rotation(
        self,
        num_heads: tuple[int, int],
        norms: tuple[tuple[Tensor, float] | None, tuple[Tensor, float] | None],
        head_dim: int,
        width: int,
        dtype: torch.dtype,
    ) -> Rotation:
        """What `rotate` is to do to that many query and key heads of a row of `width` numbers.

        The norms, scale and epsilon, are kept alive by the caller.
        """
        query, key = (
            NormedHeads.of(count, *(norm or (None, 0.0))) for count, norm in zip(num_heads, norms, strict=True)
        )
        return Rotation.of(query, key, head_dim, width, dtype)

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
