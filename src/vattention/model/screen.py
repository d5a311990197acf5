"""Screens: by what is known of its products, most of an output layer need not be read to find the largest."""

from __future__ import annotations

import math

from torch import Tensor

from vattention.native import ScreenCopy

_MOST_RESTS = 8
"""Steps without a screen after several that were of no use."""


class Screen:
    """Memory of what finds a weight's largest products, as screen_bytes.c or screen_halves.c has it, not filled in.

    Where a model is at a loss, with thousands of tokens about equally likely, a screen is work for nothing. The
    next tokens may be no better, so it rests, twice as long each time.

    Attributes:
        copy: as the compiled code takes it.
        nbytes: of this memory.

    Args:
        tensors: numbers, scales, errors and sums, as `vattention_screen` has them.
        most_rows: for which it takes less time than computing everything.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        num_out: int,
        num_steps: int,
        most_rows: float = math.inf,
    ) -> None:
        self._tensors = tensors
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        self.most_rows = most_rows
        self.copy = ScreenCopy(*(tensor.data_ptr() for tensor in tensors), num_out, num_steps)
        self._num_rests = 0
        self._next_rests = 1

    def take_rest(self) -> bool:
        """Whether to do without it this time; asked once in each step."""
        rests = self._num_rests > 0
        self._num_rests -= rests
        return rests

    def note(self, useful: bool) -> None:
        """What came of using it."""
        if useful:
            self._next_rests = 1
        else:
            self._num_rests = self._next_rests
            self._next_rests = min(2 * self._next_rests, _MOST_RESTS)
