"""A batch's sequences as kernels on a GPU take them: numbers in tensors, copied there once for all layers.

Decoding sequences and those that bring more rows are two calls of a kernel: the first reads all of the cache for
few rows and is split along the keys, the second is matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from vattention.attention.kernel import Once, RaggedBatch, Span
from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView, PagedLayerView


@dataclass(frozen=True, slots=True)
class Sequences:
    """Some of a batch's sequences, n of them.

    Attributes:
        spans: as in the batch.
        rows: of the batch, R of them.
        window: tokens that a row sees, or None.
        begins: first key that each reads: under a window nothing before it may be touched, because its memory may
            be gone.
        numbers: [5, n + 1] int32 on the batch's device: what the properties return.
        once: for what kernels work out from this.
    """

    spans: tuple[Span, ...]
    rows: slice | torch.Tensor
    window: int | None
    begins: tuple[int, ...]
    numbers: torch.Tensor
    once: Once = field(default_factory=Once, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def slots(self) -> torch.Tensor:
        """[n] int32."""
        return self.numbers[0, :-1]

    @property
    def first_keys(self) -> torch.Tensor:
        """[n] int32: `begins`."""
        return self.numbers[1, :-1]

    @property
    def end_keys(self) -> torch.Tensor:
        """[n] int32: one past the last key of each, its last row's own."""
        return self.numbers[2, :-1]

    @property
    def row_starts(self) -> torch.Tensor:
        """[n + 1] int32: rows before each sequence, and all of them."""
        return self.numbers[3]

    @property
    def num_keys(self) -> torch.Tensor:
        """[n] int32: keys from the first to the last."""
        return self.numbers[4, :-1]

    @property
    def own_spans(self) -> tuple[Span, ...]:
        """The spans with rows counted among these sequences'."""
        return self.once("own spans", lambda: tuple(self._own_spans()))

    def _own_spans(self) -> Iterator[Span]:
        first_row = 0
        for slot, _, num_rows, start in self.spans:
            yield slot, first_row, num_rows, start
            first_row += num_rows

    @property
    def most_rows(self) -> int:
        return max(num_rows for _, _, num_rows, _ in self.spans)

    @property
    def num_rows(self) -> int:
        return sum(num_rows for _, _, num_rows, _ in self.spans)

    @property
    def most_keys(self) -> int:
        return max(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """`num_keys` on the host."""
        return tuple(
            start + num_rows - begin for (_, _, num_rows, start), begin in zip(self.spans, self.begins, strict=True)
        )

    @property
    def is_decode(self) -> bool:
        """Whether each brings one row: it sees all keys from its first to its last."""
        return self.most_rows == 1

    @property
    def window_left(self) -> int:
        """Keys that a row sees before its own; -1 for all from the sequence's first on."""
        is_cut = self.window is not None and not self.is_decode and self.most_keys > self.window
        return self.window - 1 if is_cut and self.window is not None else -1


def sequences(
    batch: RaggedBatch, window: int | None, make: Callable[[], tuple[Sequences, ...]] | None = None
) -> tuple[Sequences, ...]:
    """The batch's decoding sequences and its others; whichever there are, the same objects for all layers.

    Args:
        make: what makes them, for whoever asks first and knows them from elsewhere than the batch's spans.
    """
    return batch.once(("sequences", window), make or (lambda: tuple(_halves(batch, window))))


def _halves(batch: RaggedBatch, window: int | None) -> Iterator[Sequences]:
    decodes = tuple(span for span in batch.spans if span[2] == 1)
    others = tuple(span for span in batch.spans if span[2] > 1)
    for spans in (decodes, others):
        if spans:
            yield _of(spans, window, batch.slots)


def _of(spans: tuple[Span, ...], window: int | None, like: torch.Tensor) -> Sequences:
    begins = tuple(0 if window is None else max(0, start - window + 1) for _, _, _, start in spans)
    ends = [start + num_rows for _, _, num_rows, start in spans]
    row_starts = [0]
    for _, _, num_rows, _ in spans:
        row_starts.append(row_starts[-1] + num_rows)
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    columns = [[span[0] for span in spans] + [0], [*begins, 0], [*ends, 0], row_starts, [*lengths, 0]]
    return Sequences(spans, _rows(spans, like), window, begins, sent(columns, torch.int32, like.device))


def _rows(spans: tuple[Span, ...], like: torch.Tensor) -> slice | torch.Tensor:
    """A slice where the spans' rows are neighbours, which takes no copy."""
    ends = [first_row + num_rows for _, first_row, num_rows, _ in spans]
    if all(span[1] == end for span, end in zip(spans[1:], ends[:-1], strict=True)):
        return slice(spans[0][1], ends[-1])
    rows = [row for _, first_row, num_rows, _ in spans for row in range(first_row, first_row + num_rows)]
    return sent(rows, torch.int64, like.device)


def sent(numbers: object, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers as a tensor on a device, without waiting for what the device is doing."""
    here = torch.as_tensor(numbers, dtype=dtype)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Tables:
    """Block tables of some sequences, from the first block on that each reads.

    Attributes:
        source: the table of all slots.
        blocks: [n, most] int32; entries behind a sequence's last block mean nothing.
        num_keys: [n] int32: keys from those blocks' first on; under a window some that no row sees come first.
        lengths: the same on the host.
        most_keys: none of them is more.
        window_left: keys that a row sees before its own; -1 for all from the first block on.
    """

    source: torch.Tensor
    blocks: torch.Tensor
    num_keys: torch.Tensor
    lengths: tuple[int, ...]
    most_keys: int
    window_left: int


def tables(view: PagedLayerView, chosen: Sequences) -> Tables:
    """The sequences' tables, the same object for all layers that share one table."""
    # No other table can have this id: what is kept holds on to the table.
    key = ("tables", id(view.tables), view.block_size)
    return chosen.once(key, lambda: _tables(view.tables, view.block_size, chosen))


def _tables(every: torch.Tensor, size: int, chosen: Sequences) -> Tables:
    firsts = [begin // size for begin in chosen.begins]
    ends = [start + num_rows for _, _, num_rows, start in chosen.spans]
    lengths = tuple(end - first * size for first, end in zip(firsts, ends, strict=True))
    window = chosen.window
    # Under a window the first block may begin up to a block before it.
    reach = max(ends) if window is None else min(max(ends), window + chosen.most_rows + size - 2)
    most = -(-reach // size)
    window_left = window - 1 if window is not None and reach > window else -1
    rows = every.index_select(0, chosen.slots)
    if not any(firsts):
        return Tables(every, rows[:, :most].contiguous(), chosen.end_keys, lengths, reach, window_left)
    first_blocks = chosen.first_keys // size
    columns = first_blocks.unsqueeze(1) + torch.arange(most, device=every.device)
    blocks = rows.gather(1, columns.clamp_(max=every.shape[1] - 1))
    return Tables(every, blocks, chosen.end_keys - first_blocks * size, lengths, reach, window_left)


View = TypeVar("View", bound=CacheView)


class SplitKernel(Generic[View]):
    """A kernel that takes a batch in two calls, one for decoding sequences and one for the others."""

    uncapturable: str | None = None

    def unsupported(self, spec: AttentionSpec, view: View) -> str | None:
        """As of `AttentionKernel`."""
        raise NotImplementedError

    def __call__(
        self,
        query: torch.Tensor,
        view: View,
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = query if query.stride(-1) == 1 else query.contiguous()
        halves = sequences(batch, spec.window)
        if len(halves) == 1:
            return self.attend(rows, view, halves[0], spec, sinks)
        output = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        for half in halves:
            output[half.rows] = self.attend(rows[half.rows], view, half, spec, sinks)
        return output

    def attend(
        self,
        query: torch.Tensor,
        view: View,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """[R, num_heads, value_dim] of the chosen sequences' rows, `query` [R, num_heads, key_dim]."""
        raise NotImplementedError
