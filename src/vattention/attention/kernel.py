"""The contract of an attention kernel over a layer's cache.

A kernel sees queries of a ragged batch in one tensor and a layer's keys and values through one kind of view; who
owns the memory behind them it cannot know. What it cannot compute it says beforehand (`unsupported`), so that
another kernel is chosen: a feature is never dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, TypeVar, cast

import torch

from vattention.core import AttentionSpec, Chunk
from vattention.kv.manager import CacheView
from vattention.native import Int64s, int64s

Span = tuple[int, int, int, int]
"""One sequence's share of a batch: slot, first row, number of rows, position of the first."""


T = TypeVar("T")


class Once:
    """What was worked out already, by what it was worked out from."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when it was asked for under this key first."""
        if key not in self._known:
            self._known[key] = make()
        return cast(T, self._known[key])


@dataclass(frozen=True, slots=True)
class Parts:
    """A batch's sequences by the number of their rows.

    Attributes:
        short: the spans of few rows, in the order of the batch, as the compiled code takes them.
        long: the other spans.
        long_spans: the same for these.
    """

    short: Int64s
    long: tuple[Span, ...]
    long_spans: Int64s


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """The shape of one forward pass: sequences of different lengths, flattened to one row of T tokens.

    Attributes:
        spans: per sequence (slot, first row, number of rows, start): its tokens are rows [first, first + number)
            of the batch, at positions [start, start + number); its cache holds tokens [0, start + number) by the
            time attention runs.
        device: of `slots` and `positions`.
        once: for what is worked out from the batch alone, where it is asked for: once for all layers of a forward
            pass.
    """

    spans: tuple[Span, ...]
    device: torch.device | str = "cpu"
    once: Once = field(default_factory=Once, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, chunks: Sequence[Chunk], device: torch.device | str = "cpu") -> RaggedBatch:
        spans: list[Span] = []
        first = 0
        for chunk in chunks:
            count = len(chunk.token_ids)
            spans.append((chunk.slot, first, count, chunk.start))
            first += count
        return cls(tuple(spans), device)

    @classmethod
    def on_device(cls, slots: torch.Tensor, positions: torch.Tensor, spans: tuple[Span, ...]) -> RaggedBatch:
        """A batch whose `slots` and `positions` are there, whatever the spans say of them."""
        batch = cls(spans, slots.device)
        batch.once("slots", lambda: slots)
        batch.once("positions", lambda: positions)
        return batch

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(num_rows for _, _, num_rows, _ in self.spans)

    @property
    def slots(self) -> torch.Tensor:
        """[T] int64, the slot of each token."""
        return self.once("slots", lambda: self._of_tokens([slot] * count for slot, _, count, _ in self.spans))

    @property
    def positions(self) -> torch.Tensor:
        """[T] int64, the position of each token in its sequence."""
        return self.once(
            "positions", lambda: self._of_tokens(range(start, start + count) for _, _, count, start in self.spans)
        )

    @property
    def is_decode(self) -> bool:
        """Whether every sequence brings one token."""
        return all(num_rows == 1 for _, _, num_rows, _ in self.spans)

    def parts(self, most_rows: int) -> Parts:
        """The batch in two, `most_rows` being few: the same object for all layers of a forward pass."""
        return self.once(("parts", most_rows), lambda: self._parts(most_rows))

    def _of_tokens(self, numbers: Iterable[Iterable[int]]) -> torch.Tensor:
        return torch.tensor(list(chain.from_iterable(numbers)), dtype=torch.int64, device=self.device)

    def _parts(self, most_rows: int) -> Parts:
        short = [span for span in self.spans if span[2] <= most_rows]
        long = tuple(span for span in self.spans if span[2] > most_rows)
        return Parts(int64s(chain.from_iterable(short)), long, int64s(chain.from_iterable(long)))


View_contra = TypeVar("View_contra", bound=CacheView, contravariant=True)


class AttentionKernel(Protocol[View_contra]):
    """Causal attention of a ragged batch over cached keys and values."""

    @property
    def name(self) -> str: ...

    @property
    def reads(self) -> type[CacheView]:
        """The kind of view this kernel takes."""
        ...

    @property
    def uncapturable(self) -> str | None:
        """Why a decode step with this kernel cannot be a CUDA graph, or None if it can: from a `fixed_batch` it
        takes no numbers on the host but those that bound what there is on the device, and waits for nothing.
        """
        ...

    def unsupported(self, spec: AttentionSpec, view: View_contra) -> str | None:
        """Why this kernel cannot compute such a layer over such a view, or None if it can."""
        ...

    def __call__(
        self,
        query: torch.Tensor,
        view: View_contra,
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [T, num_heads, key_dim].
            view: the layer's cache, with this batch's keys and values already written.
            sinks: [num_heads] logits where `spec.has_sinks`, else None.

        Returns:
            [T, num_heads, value_dim], in the query's dtype.
        """
        ...
