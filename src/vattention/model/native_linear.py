"""Linear layers by the compiled kernels, and the largest of an output layer's outputs."""

from __future__ import annotations

import math
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vattention.model import panels
from vattention.model.panels import COLUMNS
from vattention.model.screen import Screen
from vattention.native import Largest, LinearWeight, Noise, WeightFormat, kernels
from vattention.native.huge import Empty, huge_empty

_TILE_STEPS = 32
"""Inputs that a matrix tile takes at a time."""

_MOST_SCREENED = 1 << 16
"""Inputs of a screened layer whose products of bytes 32 bits can surely sum."""


class NativeLinear:
    """The kernel of native/linear.c: one packed copy of the weight, computed in float32 at any number of rows."""

    name: ClassVar[str] = "native"
    exact: ClassVar[bool] = True
    form: ClassVar[WeightFormat] = WeightFormat.PLAIN

    def __init__(self, weight: Tensor, bias: Tensor | None, empty: Empty = huge_empty) -> None:
        library = kernels()
        if library is None:
            raise RuntimeError("the compiled kernels are not there; ask available() first")
        self._products = library.products
        self._num_out, self._num_in = weight.shape
        self._dtype = weight.dtype
        self._panels = self._packed(weight, empty)
        self._bias = None if bias is None else F.pad(bias.float(), (0, -self._num_out % COLUMNS))
        self._native = LinearWeight.of(
            self._panels, self._bias, self._num_out, self._num_in, self._dtype, self.form
        )
        self.nbytes = self._panels.nbytes
        self._screen: Screen | None = None

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, empty: Empty = huge_empty) -> Self:
        return cls(weight, bias, empty)

    @classmethod
    def available(cls, dtype: torch.dtype) -> bool:
        library = kernels()
        return library is not None and dtype in library.dtypes

    @classmethod
    def has_tiles(cls, num_in: int, dtype: torch.dtype) -> bool:
        """Whether matrix tiles multiply weights of this type and so many inputs."""
        library = kernels()
        return (
            library is not None
            and library.products.has_tiles
            and dtype == torch.bfloat16
            and num_in % _TILE_STEPS == 0
        )

    def _packed(self, weight: Tensor, empty: Empty) -> Tensor:
        """The weight as the compiled code takes it."""
        return panels.pack(weight, empty)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self._dtype or x.shape[1] != self._num_in:
            raise RuntimeError(
                f"x is {x.dtype} of {x.shape[1]} columns; the weight is {self._dtype} of {self._num_in}"
            )
        y = x.new_empty(x.shape[0], self._num_out)
        self.write(x, y)
        return y

    @property
    def num_out(self) -> int:
        return self._num_out

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def native(self) -> LinearWeight:
        """The weight as the compiled code takes it, good as long as this."""
        return self._native

    def write(self, x: Tensor, y: Tensor) -> None:
        """The product into contiguous y[rows, out], of the weight's type or float32."""
        if x.shape[0] > 0:
            self._products.linear(self._native, x if x.stride(1) == 1 else x.contiguous(), y)

    def largest(self, x: Tensor, noise: Noise | None = None) -> Largest:
        """Each row's first largest output, NaN counting as largest: its index and its value before rounding.

        Args:
            noise: of each row, added before outputs are compared, and in the value.
        """
        if x.shape[0] == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        x = x if x.stride(1) == 1 else x.contiguous()
        if self._screen is None or x.shape[0] > self._screen.most_rows or self._screen.take_rest():
            return self._products.largest(self._native, x, noise)
        largest, useful = self._products.screened_largest(self._native, self._screen.copy, x, noise)
        self._screen.note(useful)
        return largest

    def screen(self) -> bool:
        """Let `largest` read about half as much memory, with the same results: by a copy of the weight in 8 bits.

        Whether this was done: it takes a processor with the instructions, bfloat16, plain or quantized in halves,
        sums that fit into 32 bits, and no bias.
        """
        if self._products.can_screen and self._bias is None and self._dtype == torch.bfloat16:
            screen = self._screen_of()
            if screen is not None and self._products.screen(screen.copy, self._native):
                self._screen = screen
        return self._screen is not None

    @property
    def screen_nbytes(self) -> int:
        """Memory of the screen; 0 without one."""
        return 0 if self._screen is None else self._screen.nbytes

    def _screen_of(self) -> Screen | None:
        """A screen, not filled in, for a bfloat16 layer that one fits."""
        if self._num_in > _MOST_SCREENED:
            return None
        num_panels, num_steps = math.ceil(self._num_out / COLUMNS), math.ceil(self._num_in / 64) * 16
        numbers = huge_empty(num_panels * num_steps * COLUMNS * 4, torch.int8)
        scales, errors = torch.empty(2, num_panels * COLUMNS)
        sums = torch.empty(num_panels * COLUMNS, dtype=torch.int32)
        return Screen((numbers, scales, errors, sums), self._num_out, num_steps)

    def weight(self) -> Tensor:
        return panels.unpack(self._panels, self._num_out, self._num_in)
