"""One layer of `VirtualCache`, with full attention or with a sliding window."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from vattention.errors import ContextLengthError, RequestError
from vattention.hf.growing import CacheMemory, GrowingTensor
from vattention.hf.rows import SPARE, Lineage, moves


class VirtualLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer with full attention, which new tokens extend in place.

    Attributes:
        keys, values: the tokens in the cache, [batch, heads, tokens, dim]; None before the first update and after a
            reset. They, and what `update` returns, are views: the next call that changes the cache may change them,
            or take the memory behind dropped tokens away. Clone what must last.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, memory: CacheMemory, max_length: int) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self._memory = memory
        self._max_length = max_length
        # None before the first update; and while offloaded, when `keys` and `values` are all there is.
        self._stored: tuple[GrowingTensor, GrowingTensor] | None = None
        self._lineage = Lineage(0)
        # Tokens [_first, _length) are in memory.
        self._first = self._length = 0

    @property
    def mapped_nbytes(self) -> int:
        """Physical memory behind the layer, in bytes."""
        return sum(tensor.mapped_nbytes for tensor in self._stored or ())

    @property
    def reserved_nbytes(self) -> int:
        """Addresses the layer may grow into, in bytes."""
        return sum(tensor.reserved_nbytes for tensor in self._stored or ())

    @property
    def is_offloaded(self) -> bool:
        """The tokens are in ordinary CPU memory, and come back with the next call that needs them."""
        return self.is_initialized and self._stored is None

    def _first_visible(self, num_tokens: int) -> int:
        """The first token that a forward attends to when `num_tokens` came before it."""
        return 0

    def _first_kept(self) -> int:
        """The first token that must stay in memory for the next forward."""
        return self._first_visible(self._length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve addresses, now that batch, heads, sizes, dtype and device are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._stored = self._reserve(key_states, value_states, len(key_states))
        self._lineage = Lineage(len(key_states))
        self._show()
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens, and return the keys and values that attention over them reads.

        No gradient flows through the cache.

        Args:
            key_states, value_states: [batch, heads, new tokens, dim].

        Raises:
            ContextLengthError: they do not fit into `max_length`; nothing has changed.
            OutOfMemoryError: there is not enough memory for them; the layers before this one have them already, so
                `reset` the cache before using it again.
            RequestError: batch, heads or sizes are not those of the tokens in the cache.
        """
        start, end = self._length, self._length + key_states.shape[-2]
        if end > self._max_length:
            raise ContextLengthError(
                f"the cache needs room for {end:,} tokens, and has room for {self._max_length:,}; raise "
                "VirtualCache's max_length, which costs addresses only",
                param="max_length",
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stored = self._resident()
        states = (key_states, value_states)
        for tensor, new in zip(stored, states, strict=True):
            if new.shape != (expected := (*tensor.view.shape[:2], end - start, tensor.view.shape[3])):
                raise RequestError(
                    f"new tokens have the shape {tuple(new.shape)}, and the cache takes {expected}; "
                    "reset() it before it serves another batch",
                    param="past_key_values",
                )
        self._first = self._first_kept()
        for tensor in stored:
            tensor.drop_before(self._first)
            tensor.provide(self._first, end)
        with torch.no_grad():
            for tensor, new in zip(stored, states, strict=True):
                tensor.view.narrow(2, start, end - start).copy_(new)
        self._length = end
        self._show()
        visible = self._first_visible(start)
        keys, values = (tensor.view.narrow(2, visible, end - visible) for tensor in stored)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen so far, those behind a window included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens `update` returns when `query_length` of them are new, and the position of the first."""
        first = self._first_visible(self._length)
        return self._length - first + query_length, first

    def get_max_length(self) -> int:
        """-1, as transformers' dynamic layers say: models pad their masks to any other number (Bloom does)."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; their pages go back, but for one in each row.

        Raises:
            RequestError: the number is positive; or tokens would be visible again that fell behind the window and
                are gone.
        """
        if tokens_to_remove > 0:
            raise RequestError(
                f"crop({tokens_to_remove}) is not supported; give the number of tokens to remove as a negative one",
                param="tokens_to_remove",
            )
        if not self.is_initialized:
            return
        length = max(self._length + tokens_to_remove, 0)
        first = self._first_visible(length)
        if first < self._first:
            raise RequestError(
                f"crop({tokens_to_remove}) needs tokens from {first:,} on, and the sliding window left those from "
                f"{self._first:,} on; call activate_past_recording() before the forward that may be undone",
                param="tokens_to_remove",
            )
        stored = self._resident()
        self._first, self._length = first, length
        for tensor in stored:
            tensor.drop_before(first)
            tensor.drop_after(length)
        self._lineage.crop(length)
        self._show()

    def reset(self) -> None:
        """Forget everything. The memory goes back as soon as no tensor over it is left."""
        self.keys = self.values = self._stored = None
        self._first = self._length = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row i be what row `beam_idx[i]` was; copies rows that change, from where they differ."""
        if not self._length:
            return
        parents = beam_idx.tolist()
        stored = self._resident()
        if len(parents) != len(stored[0].view):
            self._take(parents)
            return
        for tensor in stored:
            rows = tensor.view.narrow(2, self._first, self._length - self._first)
            spare = rows[:0]
            for row, parent in moves(parents):
                if row == SPARE:
                    spare = rows[parent].clone()
                    continue
                start = max(self._lineage.shared(row, parents[row]) - self._first, 0)
                source = spare if parent == SPARE else rows[parent]
                rows[row, :, start:].copy_(source[:, start:])
        self._lineage.take(parents, self._length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, one after the other."""
        if self._length:
            self._take([row for row in range(len(self.keys)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows that `indices`, numbers or a mask, select."""
        if self._length:
            self._take(torch.arange(len(self.keys), device=indices.device)[indices].tolist())

    def offload(self) -> None:
        """Move the tokens to ordinary CPU memory, and give the mapped memory back."""
        if self._stored is not None:
            self.keys, self.values = (tensor.to("cpu", copy=True) for tensor in self._in_memory(self._stored))
            self._stored = None

    def prefetch(self) -> None:
        """Undo `offload`. Every call that needs the tokens does so too."""
        if self.is_offloaded:
            self._resident()

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualLayer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = {
            name: copy.deepcopy(value, memo)
            for name, value in self.__dict__.items()
            if name not in ("keys", "values", "_stored")
        }
        twin.keys, twin.values, twin._stored = self.keys, self.values, None
        if self._stored is not None:
            twin.keys, twin.values = self._in_memory(self._stored)
            twin.prefetch()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """The layer, offloaded: a pickled view would write out all that is reserved."""
        state = dict(self.__dict__, _stored=None)
        if self._stored is not None:
            state["keys"], state["values"] = (tensor.cpu().clone() for tensor in self._in_memory(self._stored))
        return state

    def _in_memory(self, stored: Iterable[GrowingTensor]) -> list[torch.Tensor]:
        """Views of all tokens that are in memory, which may be more than are kept."""
        return [tensor.view.narrow(2, self._first, self._length - self._first) for tensor in stored]

    def _resident(self) -> tuple[GrowingTensor, GrowingTensor]:
        """The growing tensors, filled from `keys` and `values` if the layer was offloaded."""
        if self._stored is None:
            self._stored = self._filled(self.keys, self.values, range(len(self.keys)))
            self._show()
        return self._stored

    def _take(self, parents: Sequence[int]) -> None:
        """Become a batch in which row i is what row `parents[i]` was."""
        keys, values = self._in_memory(self._resident())
        self._stored = self._filled(keys, values, parents)
        self._lineage.take(parents, self._length)
        self._show()

    def _filled(
        self, keys: torch.Tensor, values: torch.Tensor, parents: Sequence[int]
    ) -> tuple[GrowingTensor, GrowingTensor]:
        """New growing tensors, whose row i holds row `parents[i]` of tokens [_first, _length)."""
        stored = self._reserve(keys, values, len(parents))
        for tensor, source in zip(stored, (keys, values), strict=True):
            tensor.provide(self._first, self._length)
            target = tensor.view.narrow(2, self._first, self._length - self._first)
            for row, parent in enumerate(parents):
                target[row].copy_(source[parent])
        return stored

    def _reserve(self, keys: torch.Tensor, values: torch.Tensor, batch: int) -> tuple[GrowingTensor, GrowingTensor]:
        def reserve(like: torch.Tensor) -> GrowingTensor:
            shape = (batch, like.shape[1], self._max_length, like.shape[3])
            return GrowingTensor(self._memory, shape, self.dtype, self.device)

        return reserve(keys), reserve(values)

    def _show(self) -> None:
        """Point `keys` and `values` at the tokens the next forward needs."""
        first = self._first_kept()
        if self._stored is not None:
            self.keys, self.values = (tensor.view.narrow(2, first, self._length - first) for tensor in self._stored)


class VirtualSlidingLayer(VirtualLayer):
    """Keys and values of one layer with a sliding window; memory behind the window goes back."""

    is_sliding = True

    def __init__(self, memory: CacheMemory, max_length: int, sliding_window: int) -> None:
        super().__init__(memory, max_length)
        self.sliding_window = sliding_window
        self.record_past = False

    def activate_past_recording(self) -> None:
        """From now on keep tokens that fall behind the window until `crop`, so that it can bring them back."""
        self.record_past = True

    def get_max_length(self) -> int:
        """The window, as transformers' sliding layers say."""
        return self.sliding_window

    def _first_visible(self, num_tokens: int) -> int:
        return max(num_tokens - self.sliding_window + 1, 0)

    def _first_kept(self) -> int:
        return self._first if self.record_past else super()._first_kept()
