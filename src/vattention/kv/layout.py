"""Where each token's keys and values lie: arithmetic between tokens and bytes, with no memory behind it.

The virtual range is cut into *planes*. A plane is one row per slot, a row is `max_len` tokens of `token_nbytes`
each, and whole pages: growing a sequence by some tokens means mapping the next pages of its row in every plane.

- per-layer: each layer's K and each layer's V is a plane, [slots, max_len, heads, dim] and dense.
- sliced: all layers of a group share one plane; a token's K and V of all layers are neighbours. Growth is one run
  of pages, and a large page holds few tokens. This is the vAttention paper's tensor slicing (arXiv 2405.04437)
  taken to its end.

Layers that see the same part of the past form a *group*: full attention, or one window size. A group maps and
unmaps in lockstep. Which layout it is shows only in the numbers; nothing branches on it afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vattention.core import AttentionSpec
from vattention.errors import ConfigError
from vattention.memory.driver import IntArray

MAX_TOKENS = 2**31
"""Kernels that view the cache as one row of tokens index it with int32."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One row per slot.

    Attributes:
        offset_nbytes: where slot 0's row begins in the range.
        row_nbytes: of one slot; whole tokens and whole pages.
        token_nbytes: of one token in this plane.
    """

    offset_nbytes: int
    row_nbytes: int
    token_nbytes: int


@dataclass(frozen=True)
class Group:
    """Layers that need the same tokens of the past, and the planes they lie in.

    Attributes:
        window: tokens each token sees, itself included; None for all before it.
        planes: in ascending order of offset.
        page_nbytes: of the driver.
        step: tokens by which the group grows; a page of the widest plane, or one token if that is larger.
        layers: the layers that lie here, by their index in the model.
    """

    window: int | None
    planes: tuple[Plane, ...]
    page_nbytes: int
    step: int
    layers: tuple[int, ...]
    _widths: frozenset[int] = field(init=False, repr=False, compare=False)
    _token_nbytes: IntArray = field(init=False, repr=False, compare=False)
    _row_pages: IntArray = field(init=False, repr=False, compare=False)
    _offset_pages: IntArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def column(values: list[int]) -> IntArray:
            return np.array(values, np.int64)

        object.__setattr__(self, "_widths", frozenset(p.token_nbytes for p in self.planes))
        object.__setattr__(self, "_token_nbytes", column([p.token_nbytes for p in self.planes]))
        object.__setattr__(self, "_row_pages", column([p.row_nbytes // self.page_nbytes for p in self.planes]))
        object.__setattr__(
            self, "_offset_pages", column([p.offset_nbytes // self.page_nbytes for p in self.planes])
        )

    def first_needed(self, start: int) -> int:
        """The first token that a query at position `start` reads."""
        return 0 if self.window is None else max(0, start - self.window + 1)

    def first_needed_each(self, starts: IntArray) -> IntArray:
        """`first_needed` of many positions."""
        return np.zeros_like(starts) if self.window is None else np.maximum(0, starts - self.window + 1)

    def pages(self, slot: int, first: int, last: int) -> IntArray:
        """Indices of all pages that hold any byte of the slot's tokens [first, last), ascending."""
        if last <= first:
            return np.empty(0, np.int64)
        return self._expand(slot, self._floor(first), self._ceil(last))

    def pages_behind(self, slot: int, first: int, until: int) -> IntArray:
        """Indices of the pages from token `first`'s on that end before token `until` begins, ascending."""
        return self._expand(slot, self._floor(first), self._floor(until))

    def crosses_page(self, first: int, until: int) -> bool:
        """Whether `pages_behind` would return any. It is asked for each sequence in each step."""
        size = self.page_nbytes
        return any(first * width // size < until * width // size for width in self._widths)

    def pages_beyond(self, slot: int, num_tokens: int, last: int) -> IntArray:
        """Indices of the pages that begin after the first `num_tokens` end, up to token `last` - 1's, ascending."""
        return self._expand(slot, self._ceil(num_tokens), self._ceil(last))

    def pages_astride(self, slot: int, num_tokens: int) -> IntArray:
        """Indices of the pages that begin before the first `num_tokens` end and end after that, ascending."""
        return self._expand(slot, self._floor(num_tokens), self._ceil(num_tokens))

    def _floor(self, num_tokens: int | IntArray) -> IntArray:
        """Whole pages in the first tokens of a row, per plane."""
        return num_tokens * self._token_nbytes // self.page_nbytes

    def _ceil(self, num_tokens: int | IntArray) -> IntArray:
        """Pages that hold any of the first tokens of a row, per plane."""
        return -(-num_tokens * self._token_nbytes // self.page_nbytes)

    def bounds(self, first: IntArray, last: IntArray) -> tuple[IntArray, IntArray]:
        """Of tokens [first[i], last[i]) of n rows the first page and the one behind the last, [n, planes] each."""
        last = np.where(first < last, last, 0)
        return self._floor(first[:, None]), self._ceil(last[:, None])

    def _expand(self, slot: int, first: IntArray, last: IntArray) -> IntArray:
        """Page indices from per-plane bounds inside the slot's row: first to last - 1 of each plane, ascending."""
        return self.expand(np.array([slot]), first, last)

    def expand(self, slots: IntArray, first: IntArray, last: IntArray) -> IntArray:
        """Page indices from `bounds` inside the rows of n slots, slot by slot."""
        counts = np.maximum(last - first, 0).ravel()
        ends = np.cumsum(counts)
        starts = (self._offset_pages + slots[:, None] * self._row_pages + first).ravel()
        return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1], dtype=np.int64)

    def num_pages(self, first: int, last: int) -> int:
        """How many pages `pages` would return."""
        return int((self._ceil(last) - self._floor(first)).sum()) if last > first else 0

    @property
    def token_nbytes(self) -> int:
        return sum(plane.token_nbytes for plane in self.planes)


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One layer's K or V in the range: shape [num_slots, max_len, num_heads, dim] with strides in bytes."""

    offset_nbytes: int
    shape: tuple[int, int, int, int]
    strides_nbytes: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole range.

    Attributes:
        nbytes: addresses to reserve.
        max_len: tokens per slot; at least what was asked for, rounded up to whole pages.
        groups: in ascending order of offset.
        keys, values: per layer.
    """

    page_nbytes: int
    num_slots: int
    max_len: int
    nbytes: int
    groups: tuple[Group, ...]
    keys: tuple[TensorPlace, ...]
    values: tuple[TensorPlace, ...]

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token over all layers."""
        return sum(group.token_nbytes for group in self.groups)

    def sequence_nbytes(self, num_tokens: int) -> int:
        """Pages of one sequence of so many tokens, about to compute its last."""
        return self.page_nbytes * sum(
            group.num_pages(group.first_needed(num_tokens - 1), num_tokens) for group in self.groups
        )


def plan(
    specs: Sequence[AttentionSpec],
    *,
    item_nbytes: int,
    num_slots: int,
    max_len: int,
    page_nbytes: int,
    sliced: bool,
) -> Layout:
    """Lay out the cache of a model whose layers store keys and values as `specs` say.

    Args:
        specs: one per layer that stores something.
        item_nbytes: of one number: 2 for bfloat16.
        sliced: all layers of a group in one plane, instead of one plane per layer's K and V.

    Raises:
        ConfigError: slots times tokens exceed what kernels can index.
    """
    by_window: dict[int | None, list[int]] = {}
    for index, spec in enumerate(specs):
        by_window.setdefault(spec.window, []).append(index)
    sizes = [
        (spec.num_kv_heads * spec.key_dim * item_nbytes, spec.num_kv_heads * spec.value_dim * item_nbytes)
        for spec in specs
    ]
    widths: dict[int | None, list[int]] = {
        window: [sum(sum(sizes[i]) for i in layers)] if sliced else [n for i in layers for n in sizes[i]]
        for window, layers in by_window.items()
    }
    # A row is whole tokens and whole pages, in every plane, for one and the same number of tokens.
    unit = math.lcm(*(page_nbytes // math.gcd(page_nbytes, n) for planes in widths.values() for n in planes))
    max_len = -(-max_len // unit) * unit
    if num_slots * max_len >= MAX_TOKENS:
        raise ConfigError(
            f"max_num_seqs={num_slots} times {max_len:,} tokens exceed the {MAX_TOKENS:,} tokens a kernel can "
            "index; lower max_num_seqs or max_model_len"
        )

    offset = 0
    groups = []
    keys: dict[int, TensorPlace] = {}
    values: dict[int, TensorPlace] = {}
    for window, layers in by_window.items():
        planes = []
        for width in widths[window]:
            planes.append(Plane(offset, max_len * width, width))
            offset += num_slots * max_len * width
        step = max(1, page_nbytes // max(widths[window]))
        groups.append(Group(window, tuple(planes), page_nbytes, step, tuple(layers)))
        inside = 0
        for position, layer in enumerate(layers):
            spec = specs[layer]
            for kind, (places, dim) in enumerate(((keys, spec.key_dim), (values, spec.value_dim))):
                plane = planes[0] if sliced else planes[2 * position + kind]
                places[layer] = TensorPlace(
                    plane.offset_nbytes + (inside if sliced else 0),
                    (num_slots, max_len, spec.num_kv_heads, dim),
                    (plane.row_nbytes, plane.token_nbytes, dim * item_nbytes, item_nbytes),
                )
                inside += sizes[layer][kind]
    order = range(len(specs))
    return Layout(
        page_nbytes,
        num_slots,
        max_len,
        offset,
        tuple(groups),
        tuple(keys[i] for i in order),
        tuple(values[i] for i in order),
    )
