"""Cosines and sines of rotary position embeddings, as a model makes them for its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vattention.native import Rotaries

Pair = tuple[Tensor, Tensor]
"""Cosines and sines, [tokens, head_dim] each."""

_LEAST, _MOST, _ROUNDED = 4096, 4096, 256
"""Positions in the first table, most that come unasked, and what those beyond the last are rounded up to."""


class RotaryTables:
    """A table for each kind of embedding that a model has, made as far as positions have come.

    Args:
        compute: the pairs of each kind for positions [n].
        max_len: positions there are, as far as is known.
    """

    def __init__(self, compute: Callable[[Tensor], Sequence[Pair]], max_len: int) -> None:
        self._compute = compute
        self._max_len = max_len
        self._len = 0
        self._tables: list[Pair] = []
        self._grow(1)

    def up_to(self, last: int) -> Rotaries:
        """The tables, which have the pairs of each kind at positions up to `last` and some more."""
        if last >= self._len:
            self._grow(last + 1)
        return self._native

    def _grow(self, least: int) -> None:
        new = min(max(least, 2 * self._len, _LEAST), max(least, self._len + _MOST), self._max_len)
        if new < least:
            new = -(-least // _ROUNDED) * _ROUNDED
        parts = [self._tables] if self._tables else []
        parts += [list(self._compute(part)) for part in torch.split(torch.arange(self._len, new), _ROUNDED)]
        kinds = zip(*parts, strict=True)
        self._tables = [
            (torch.cat([cosines for cosines, _ in kind]), torch.cat([sines for _, sines in kind])) for kind in kinds
        ]
        self._len = new
        self._native = Rotaries.of(self._tables)
