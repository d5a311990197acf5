"""The pages behind slots: growing them, giving them back, and letting two slots stand on the same ones.

In every group exactly the pages that hold any byte of its extent's tokens are mapped. Two slots that share a prefix
of n tokens have all pages that lie wholly inside it in common; each has its own copy of the page it ends in. A slot
that goes back to fewer tokens may share more than those: that becomes its own before the first write there (`own`).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vattention.errors import OutOfMemoryError
from vattention.kv.layout import Group, Layout
from vattention.kv.slots import Extent, Slot
from vattention.memory.driver import Driver, IntArray
from vattention.memory.pool import PagePool
from vattention.memory.region import Region
from vattention.memory.tensor import as_tensor

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class _Cut:
    """An extent that is about to end at token `last`, and its pages behind that."""

    extent: Extent
    last: int
    pages: IntArray


class Backing:
    """Memory behind the slots of one layout. Every method does all it was asked, or raises and changes nothing.

    Args:
        driver, pool: not owned.

    Raises (all methods):
        OutOfMemoryError: the limit, or what the system has.
        DriverError: anything else that the system refuses.
    """

    def __init__(self, driver: Driver, pool: PagePool, layout: Layout) -> None:
        self.layout = layout
        self.pool = pool
        self.region = Region(driver, pool, layout.nbytes)
        device = driver.capabilities.device
        self.memory = as_tensor(self.region.address, layout.nbytes, device=device, owner=self.region)
        # Wide elements: torch splits work among threads by their number, and a few pages are not worth waking any.
        wide = torch.int64 if layout.page_nbytes % 8 == 0 else torch.uint8
        self._pages = self.memory.view(-1, layout.page_nbytes).view(wide)
        self.version = 0
        """Changes whenever the pages of a slot do other than by growing."""
        self._addressable = driver.capabilities.addressable

    def lacks(self, slot: Slot, end: int) -> bool:
        """Whether `grow` has anything to do for tokens up to `end`. It is asked for each sequence in each step."""
        return any(end > extent.last or extent.first == extent.last for extent in slot.extents)

    def grow(self, slot: Slot, start: int, end: int) -> None:
        """Map what the slot lacks to hold tokens [start, end) and what they read."""
        if not self.lacks(slot, end):
            return
        wanted = []
        grown = []
        for group, extent in zip(self.layout.groups, slot.extents, strict=True):
            empty = extent.first == extent.last
            if end <= extent.last and not empty:
                continue
            first, mapped = (group.first_needed(start),) * 2 if empty else (extent.first, extent.last)
            last = min(-(-end // group.step) * group.step, self.layout.max_len)
            wanted.append(group.pages(slot.index, mapped, last))
            grown.append((extent, first, max(first, last)))
        missing = self.region.missing(np.concatenate(wanted))
        if len(missing):
            self.region.commit(missing)
        for extent, first, last in grown:
            extent.first, extent.last = first, last

    def give_back_behind(self, slot: Slot, start: int) -> None:
        """Unmap what lies wholly behind the window of a query at position `start`."""
        behind = []
        moved = []
        for group, extent in zip(self.layout.groups, slot.extents, strict=True):
            first = group.first_needed(start)
            first = min(first, extent.last - 1)  # the page that the extent ends in stays known
            if first > extent.first and group.crosses_page(extent.first, first):
                behind.append(group.pages_behind(slot.index, extent.first, first))
                moved.append((extent, first))
        if not moved:
            return
        self._unmap(behind)
        for extent, first in moved:
            extent.first = first

    def cut(self, slot: Slot, num_tokens: int) -> None:
        """Unmap what holds none of the first `num_tokens` tokens."""
        self._shorten([self._beyond(slot, i, num_tokens) for i in range(len(slot.extents))])

    def clear(self, slot: Slot) -> None:
        """Unmap all there is."""
        self._clear(slot, list(zip(self.layout.groups, slot.extents, strict=True)))
        slot.shared = 0

    def clear_windows(self, slot: Slot) -> None:
        """Unmap what layers with windows have."""
        pairs = zip(self.layout.groups, slot.extents, strict=True)
        self._clear(slot, [(group, extent) for group, extent in pairs if group.window is not None])

    def clear_unusable(self, slot: Slot) -> None:
        """Unmap what a new sequence, which begins at token 0, could not use."""
        pairs = zip(self.layout.groups, slot.extents, strict=True)
        self._clear(slot, [(group, extent) for group, extent in pairs if extent.first > 0])

    def share(self, source: Slot, target: Slot, num_tokens: int) -> None:
        """Let `target`, which has no memory, hold what the token behind `source`'s first `num_tokens` reads.

        Where the system has no more mappings for pages that stand behind two slots, all pages are copied.
        """
        groups = [(group, group.first_needed(num_tokens)) for group in self.layout.groups]

        def pages(slot: Slot) -> tuple[IntArray, IntArray]:
            whole, astride = [_NONE], [_NONE]
            for group, first in groups:
                if first < num_tokens:
                    whole.append(group.pages_behind(slot.index, first, num_tokens))
                    astride.append(group.pages_astride(slot.index, num_tokens))
            return np.concatenate(whole), np.concatenate(astride)

        inside, copied = pages(source)
        into, copies = pages(target)
        with ExitStack() as undo:
            self._commit(copies, undo)
            try:
                self._alias(into, self.region.pages(inside), undo)
                shared = num_tokens
            except OutOfMemoryError:
                self._commit(into, undo)
                self._write(into, self._read(inside))
                shared = 0
            self._write(copies, self._read(copied))
            undo.pop_all()
        self.version += 1
        source.shared = max(source.shared, shared)
        target.shared = shared
        for (_, first), extent in zip(groups, target.extents, strict=True):
            extent.first, extent.last = first, num_tokens

    def own(self, slot: Slot, start: int) -> None:
        """Let no page that holds token `start` or a later one stand behind another slot too.

        Those that hold earlier tokens as well are copied, the others unmapped.
        """
        if slot.shared <= start:
            return
        astride = np.concatenate([group.pages_astride(slot.index, start) for group in self.layout.groups])
        astride = astride[self._is_shared(astride)]
        if len(astride):
            self._replace(astride)
        beyond = [self._beyond(slot, i, start) for i in range(len(slot.extents))]
        # All from there on, so that what is mapped stays in one piece.
        self._shorten([cut for cut in beyond if self._is_shared(cut.pages).any()])
        slot.shared = start

    def runs(self, slot: int, num_tokens: int) -> list[torch.Tensor]:
        """The bytes of what the token behind the first `num_tokens` reads, one tensor per group and plane."""
        runs = []
        for group in self.layout.groups:
            first = group.first_needed(num_tokens)
            for plane in group.planes:
                row = plane.offset_nbytes + slot * plane.row_nbytes
                runs.append(self.memory[row + first * plane.token_nbytes : row + num_tokens * plane.token_nbytes])
        return runs

    def close(self) -> None:
        """Give everything back; tensors of the memory must not be used any more."""
        del self.memory, self._pages
        self.region.close()

    def _clear(self, slot: Slot, pairs: list[tuple[Group, Extent]]) -> None:
        self._unmap([group.pages(slot.index, extent.first, extent.last) for group, extent in pairs])
        for _, extent in pairs:
            extent.first = extent.last = 0

    def _beyond(self, slot: Slot, which: int, num_tokens: int) -> _Cut:
        """What of one group's extent holds none of the first tokens."""
        group, extent = self.layout.groups[which], slot.extents[which]
        if num_tokens <= extent.first:
            return _Cut(extent, extent.first, group.pages(slot.index, extent.first, extent.last))
        last = min(num_tokens, extent.last)
        return _Cut(extent, last, group.pages_beyond(slot.index, last, extent.last))

    def _shorten(self, cuts: list[_Cut]) -> None:
        self._unmap([cut.pages for cut in cuts])
        for cut in cuts:
            cut.extent.last = cut.last

    def _unmap(self, parts: list[IntArray]) -> None:
        """Unmap pages, all of which are mapped, by groups in ascending order."""
        indices = np.concatenate([_NONE, *parts])
        if len(indices):
            self.region.unmap(indices)
            self.version += 1

    def _commit(self, indices: IntArray, undo: ExitStack) -> None:
        if len(indices):
            self.region.commit(indices)
            undo.callback(self.region.unmap, indices)

    def _alias(self, indices: IntArray, pages: IntArray, undo: ExitStack) -> None:
        if len(indices):
            self.region.alias(indices, pages)
            undo.callback(self.region.unmap, indices)

    def _replace(self, indices: IntArray) -> None:
        """Put copies of the pages in their places."""
        pages = self.region.pages(indices)
        content = self._read(indices)
        with ExitStack() as undo:
            self.region.unmap(indices)
            undo.callback(self.region.alias, indices, pages)
            self.region.commit(indices)
            undo.pop_all()
        self.version += 1
        self._write(indices, content)

    def _is_shared(self, indices: IntArray) -> NDArray[np.bool_]:
        shared: NDArray[np.bool_] = self.pool.references(self.region.pages(indices)) > 1
        return shared

    def _read(self, indices: IntArray) -> torch.Tensor:
        """A copy of the pages [n, numbers]; of none where there is no memory to read."""
        return self._pages.index_select(0, self._on_device(indices))

    def _write(self, indices: IntArray, content: torch.Tensor) -> None:
        self._pages.index_copy_(0, self._on_device(indices), content)

    def _on_device(self, indices: IntArray) -> torch.Tensor:
        return torch.from_numpy(indices if self._addressable else _NONE).to(self._pages.device)
