"""One layer of `VirtualCache`, with full attention or with a sliding window."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
        # Tokens [_first, _length) of keys and values are in growing tensors, or parked while offloaded.
        self._first = self._length = 0
        self._stored: tuple[GrowingTensor, ...] = ()
        self._parked: tuple[torch.Tensor, ...] = ()
        self._lineage = Lineage(0)

    @property
    def mapped_nbytes(self) -> int:
        """Physical memory behind the layer, in bytes."""
        return sum(tensor.mapped_nbytes for tensor in self._stored)

    @property
    def reserved_nbytes(self) -> int:
        """Addresses the layer may grow into, in bytes."""
        return sum(tensor.reserved_nbytes for tensor in self._stored)

    @property
    def is_offloaded(self) -> bool:
        """The tokens are in ordinary CPU memory, and come back with the next call that needs them."""
        return bool(self._parked)

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

    # Mapping memory is nothing that torch.compile could trace.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
        self.prefetch()
        states = (key_states, value_states)
        for tensor, new in zip(self._stored, states, strict=True):
            if new.shape != (expected := (*tensor.view.shape[:2], end - start, tensor.view.shape[3])):
                raise RequestError(
                    f"new tokens have the shape {tuple(new.shape)}, and the cache takes {expected}; "
                    "reset() it before it serves another batch",
                    param="past_key_values",
                )
        self._first = self._first_kept()
        for tensor in self._stored:
            tensor.drop_before(self._first)
            tensor.provide(self._first, end)
        with torch.no_grad():
            for tensor, new in zip(self._stored, states, strict=True):
                tensor.view.narrow(2, start, end - start).copy_(new)
        self._length = end
        self._show()
        visible = self._first_visible(start)
        keys, values = (tensor.view.narrow(2, visible, end - visible) for tensor in self._stored)
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
        """Forget the last `-tokens_to_remove` tokens; their memory goes back, but for 16 KiB or a page per row.

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
        self.prefetch()
        self._first, self._length = first, length
        for tensor in self._stored:
            tensor.drop_before(first)
            tensor.drop_after(length)
        self._lineage.crop(length)
        self._show()

    def reset(self) -> None:
        """Forget everything. The memory goes back as soon as no tensor over it is left."""
        self.keys = self.values = None
        self._stored = self._parked = ()
        self._first = self._length = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row i be what row `beam_idx[i]` was; copies rows that change, from where they differ."""
        if not self._length:
            return
        parents = beam_idx.tolist()
        self.prefetch()
        if len(parents) != len(self.keys):
            self._take(parents)
            return
        for rows in self._tokens():
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
        self.prefetch()
        if self._length:
            self._take([row for row in range(len(self.keys)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows that `indices`, numbers or a mask, select."""
        self.prefetch()
        if self._length:
            self._take(torch.arange(len(self.keys), device=indices.device)[indices].tolist())

    def offload(self) -> None:
        """Move the tokens to ordinary CPU memory, and give the mapped memory back."""
        if self._stored:
            self._parked = tuple(tensor.to("cpu", copy=True) for tensor in self._tokens())
            self._stored = ()
            self._show()

    def prefetch(self) -> None:
        """Undo `offload`. Every call that needs the tokens does so too."""
        if self._parked:
            keys, values = self._parked
            self._stored = self._filled(keys, values, range(len(keys)))
            self._parked = ()
            self._show()

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualLayer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        tensors = {"keys": None, "values": None, "_stored": (), "_parked": ()}
        for name, value in self.__dict__.items():
            setattr(twin, name, tensors[name] if name in tensors else copy.deepcopy(value, memo))
        if self._stored:
            keys, values = self._tokens()
            twin._stored = twin._filled(keys, values, range(len(keys)))
        else:
            twin._parked = tuple(tensor.clone() for tensor in self._parked)
        twin._show()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """The layer, offloaded: a pickled view would write out all that is reserved."""
        parked = tuple(tensor.to("cpu", copy=True) for tensor in self._tokens())
        return dict(self.__dict__, keys=None, values=None, _stored=(), _parked=parked)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._show()

    def _tokens(self) -> tuple[torch.Tensor, ...]:
        """Keys and values of all tokens in memory, which may be more than the next forward needs."""
        kept = self._length - self._first
        return self._parked or tuple(tensor.view.narrow(2, self._first, kept) for tensor in self._stored)

    def _show(self) -> None:
        """Point `keys` and `values` at the tokens the next forward needs."""
        if tokens := self._tokens():
            self.keys, self.values = (tensor[:, :, self._first_kept() - self._first :] for tensor in tokens)

    def _take(self, parents: Sequence[int]) -> None:
        """Become a batch in which row i is what row `parents[i]` was."""
        keys, values = self._tokens()
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
