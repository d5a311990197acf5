"""Attention through FlashInfer's batch wrappers: `flashinfer-python` 0.2 and later, held against 0.5.3, 0.6.18 and
0.7.2.

A wrapper is told the shape of a batch once (`plan`, which runs on the host) and then runs for every layer. Caches
are "NHD": [pages, page size, heads, dim], keys and values with the same strides. A window is given by its left
side, the row's own key not counted; causal masks are aligned at the lower right. Sequences are split along the keys
between pages and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vattention.attention.libraries import installed, unsupported_device, unsupported_layer
from vattention.attention.sequences import Sequences, SplitKernel, sent, tables
from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView, LayerView, PagedLayerView

Library = Callable[[], Any]
"""Returns a module, or None where it is not installed."""

_installed: Library = partial(installed, "flashinfer")

_HEAD_DIMS = (64, 128, 256)
_WORKSPACE_NBYTES = 128 * 2**20
"""What FlashInfer's documentation recommends for the parts of split sequences."""
_PAGE_TOKENS = 128
"""FlashInfer's smallest part of a sequence, so smaller pages would only make the table longer."""
_GROUPS_WITHOUT_TENSOR_CORES = (1, 2)
"""Query heads per key head for which plain arithmetic keeps up with memory."""

_PLANS = "FlashInfer plans each batch on the host"


class FlashInferKernel(SplitKernel[LayerView]):
    """FlashInfer over contiguous slots, which it sees as pages in a row.

    Under a window pages are single tokens, since the first has to begin where the window does: before that there
    may be no memory.

    Args:
        library: gives what is called instead of `flashinfer`.
        runs_on: the type of device it is for.
    """

    name = "flashinfer"
    reads = LayerView
    uncapturable = _PLANS

    def __init__(self, library: Library = _installed, runs_on: str = "cuda") -> None:
        self._library = library
        self._runs_on = runs_on

    def unsupported(self, spec: AttentionSpec, view: LayerView) -> str | None:
        return _unsupported(spec, view, self._library, self._runs_on)

    def attend(
        self,
        query: torch.Tensor,
        view: LayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        max_len = view.keys.shape[1]
        size = 1 if chosen.window is not None else math.gcd(max_len, _PAGE_TOKENS)
        keys, values = (tokens.view(-1, size, *tokens.shape[2:]) for tokens in (view.keys, view.values))

        def planned() -> Any:
            starts, last = _pages(torch.tensor(chosen.lengths, dtype=torch.int32), size)
            firsts = (chosen.slots * max_len + chosen.first_keys) // size
            entries = _ranges(firsts, starts)
            wrapper = _wrapper(self._library(), chosen, spec, query.device)
            return _planned(wrapper, keys, chosen, spec, starts, entries, last, chosen.window_left)

        wrapper = chosen.once(("slots", spec, keys.dtype, max_len), planned)
        output: torch.Tensor = wrapper.run(query.contiguous(), (keys, values))
        return output


class FlashInferPagedKernel(SplitKernel[PagedLayerView]):
    """FlashInfer over blocks, of any size.

    Args:
        library: gives what is called instead of `flashinfer`.
        runs_on: the type of device it is for.
    """

    name = "flashinfer_paged"
    reads = PagedLayerView
    uncapturable = _PLANS

    def __init__(self, library: Library = _installed, runs_on: str = "cuda") -> None:
        self._library = library
        self._runs_on = runs_on

    def unsupported(self, spec: AttentionSpec, view: PagedLayerView) -> str | None:
        return _unsupported(spec, view, self._library, self._runs_on)

    def attend(
        self,
        query: torch.Tensor,
        view: PagedLayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        found, size = tables(view, chosen), view.block_size

        def planned() -> Any:
            starts, last = _pages(torch.tensor(found.lengths, dtype=torch.int32), size)
            # Each row's own entries, one row after the other.
            num_rows, row = found.blocks.shape
            firsts = torch.arange(0, num_rows * row, row, dtype=torch.int32, device=query.device)
            entries = found.blocks.flatten()[_ranges(firsts, starts)]
            wrapper = _wrapper(self._library(), chosen, spec, query.device)
            return _planned(wrapper, view.keys, chosen, spec, starts, entries, last, found.window_left)

        wrapper = chosen.once(("blocks", spec, view.keys.dtype, id(found.source), size), planned)
        output: torch.Tensor = wrapper.run(query.contiguous(), (view.keys, view.values))
        return output


def _pages(lengths: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n + 1] pages before each sequence, and all of them; [n] keys in each one's last page."""
    counts = -(-lengths // size)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts, lengths - (counts - 1) * size


def _ranges(firsts: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """[all] int32: as many numbers as each sequence has pages, one after the other from its first on.

    Args:
        firsts: [n] int32 on the device.
        starts: [n + 1] int32 on the host.
    """
    total = int(starts[-1])
    there = sent(torch.stack((starts[:-1], starts.diff())), torch.int32, firsts.device)
    shifts = torch.repeat_interleave(firsts - there[0], there[1], output_size=total)
    return shifts + torch.arange(total, dtype=torch.int32, device=firsts.device)


def _wrapper(library: Any, chosen: Sequences, spec: AttentionSpec, device: torch.device) -> Any:
    """A new wrapper. It is not shared by batches, since engines in several threads would plan over each other."""
    workspace = chosen.once("workspace", lambda: torch.zeros(_WORKSPACE_NBYTES, dtype=torch.uint8, device=device))
    if not chosen.is_decode:
        return library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    uses_tensor_cores = spec.num_heads // spec.num_kv_heads not in _GROUPS_WITHOUT_TENSOR_CORES
    return library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=uses_tensor_cores)


def _planned(
    wrapper: Any,
    pages: torch.Tensor,
    chosen: Sequences,
    spec: AttentionSpec,
    starts: torch.Tensor,
    entries: torch.Tensor,
    last_lengths: torch.Tensor,
    window_left: int,
) -> Any:
    """Tell the wrapper about the batch.

    Args:
        pages: the keys.
        starts: [n + 1] int32 on the host: where each sequence's entries begin, and how many there are.
        entries: [all] int32: pages, one sequence's after the other's.
        last_lengths: [n] int32 on the host: keys in each sequence's last page.
    """
    page_size = pages.shape[1]
    common = {
        "sm_scale": spec.scale,
        "window_left": window_left,
        "logits_soft_cap": spec.softcap or 0.0,
        "q_data_type": pages.dtype,
        "kv_data_type": pages.dtype,
    }
    if chosen.is_decode:
        wrapper.plan(
            starts, entries, last_lengths, spec.num_heads, spec.num_kv_heads, spec.key_dim, page_size, **common
        )
    else:
        row_starts = torch.tensor([first_row for _, first_row, _, _ in chosen.own_spans] + [chosen.num_rows])
        wrapper.plan(
            row_starts.to(torch.int32),
            starts,
            entries,
            last_lengths,
            spec.num_heads,
            spec.num_kv_heads,
            spec.key_dim,
            page_size,
            causal=True,
            **common,
        )
    return wrapper


def _unsupported(spec: AttentionSpec, view: CacheView, library: Library, runs_on: str) -> str | None:
    # The device first: importing the package takes seconds, and elsewhere it is of no use.
    reason = unsupported_device(view, runs_on) or unsupported_layer(spec, view)
    if reason is not None:
        return reason
    if spec.key_dim not in _HEAD_DIMS:
        return f"FlashInfer takes heads of {', '.join(map(str, _HEAD_DIMS))} numbers, not {spec.key_dim}"
    if view.keys.stride() != view.values.stride():
        return "FlashInfer takes keys and values with the same strides"
    return "the package flashinfer is not installed" if library() is None else None
