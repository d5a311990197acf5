"""Products with a packed weight, whole or the largest number of each row."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from ctypes import c_int32
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vattention.native.library import Library
from vattention.native.structures import DTYPES, LinearWeight, Noise, ScreenCopy, address_of

Largest = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Of rows: where each one's first largest number is, and that number; NaN counts as largest."""


class Products:
    """linear.c, quantized.c and screen.c on tensors.

    Attributes:
        has_tiles: whether the processor multiplies whole tiles of bfloat16, and the system lets it.
        can_screen: whether it has the instructions for screens.
    """

    def __init__(self, library: Library) -> None:
        self._parallel = library.parallel
        self._linear = library.function("linear", c_int32, "ppqqpiip")
        self._largest = library.function("largest", c_int32, "ppqpqqpppip")
        self._largest_of = library.function("largest_of", c_int32, "pqqqpppip")
        self._screen_pack = library.function("screen_pack", c_int32, "ppip")
        self._screened_largest = library.function("screened_largest", c_int32, "pppqqpppip")
        self.has_tiles: bool = library.function("has_tiles", c_int32, "")() == 2
        self.can_screen = bool(library.function("can_screen", c_int32, "")())

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
