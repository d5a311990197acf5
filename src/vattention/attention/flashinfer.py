"""Attention through FlashInfer's batch wrappers: `flashinfer-python` 0.2 and later, written after 0.6.18.

A wrapper is told the shape of a batch once (`plan`, which runs on the host) and then runs for every layer. Caches
are "NHD": [pages, page size, heads, dim], keys and values with the same strides. A window is given by its left
side, the row's own key not counted; causal masks are aligned at the lower right.
"""

from __future__ import annotations

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
_MOST_PAGE_NUMBERS = 2**32
"""A page's stride is a 32-bit number of elements."""
_GROUPS_WITHOUT_TENSOR_CORES = (1, 2)
"""Query heads per key head for which plain arithmetic keeps up with memory."""

_PLANS = "FlashInfer plans each batch on the host"


class FlashInferKernel(SplitKernel[LayerView]):
    """FlashInfer over contiguous slots: each slot is one page, so a table has one entry for each sequence.

    A window would need pages that begin where it does; such layers are left to others.

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
        if spec.window is not None:
            return "FlashInfer cuts no windows out of contiguous slots"
        if view.keys.stride(0) >= _MOST_PAGE_NUMBERS:
            return f"FlashInfer takes slots of fewer than {_MOST_PAGE_NUMBERS:,} numbers"
        return _unsupported(spec, view, self._library(), self._runs_on)

    def attend(
        self,
        query: torch.Tensor,
        view: LayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        def planned() -> Any:
            starts = torch.arange(len(chosen) + 1, dtype=torch.int32)
            lengths = torch.tensor(chosen.lengths, dtype=torch.int32)
            wrapper = _wrapper(self._library(), chosen, spec, query.device)
            return _planned(wrapper, view, chosen, spec, starts, chosen.slots, lengths, -1)

        wrapper = chosen.once(("slots", spec, view.keys.dtype, view.keys.shape[1]), planned)
        output: torch.Tensor = wrapper.run(query.contiguous(), (view.keys, view.values))
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
        return _unsupported(spec, view, self._library(), self._runs_on)

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
            lengths = torch.tensor(found.lengths, dtype=torch.int32)
            counts = -(-lengths // size)
            starts = torch.zeros(len(chosen) + 1, dtype=torch.int32)
            torch.cumsum(counts, 0, out=starts[1:])
            # Each row's own entries, one row after the other.
            here = torch.arange(found.blocks.shape[1]) < counts.unsqueeze(1)
            entries = found.blocks.flatten()[sent(here.flatten().nonzero().flatten(), torch.int64, query.device)]
            wrapper = _wrapper(self._library(), chosen, spec, query.device)
            last = lengths - (counts - 1) * size
            return _planned(wrapper, view, chosen, spec, starts, entries, last, found.window_left)

        wrapper = chosen.once(("blocks", spec, view.keys.dtype, id(found.source), size), planned)
        output: torch.Tensor = wrapper.run(query.contiguous(), (view.keys, view.values))
        return output


def _wrapper(library: Any, chosen: Sequences, spec: AttentionSpec, device: torch.device) -> Any:
    """A new wrapper. It is not shared by batches, since engines in several threads would plan over each other."""
    workspace = chosen.once("workspace", lambda: torch.zeros(_WORKSPACE_NBYTES, dtype=torch.uint8, device=device))
    if not chosen.is_decode:
        return library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    uses_tensor_cores = spec.num_heads // spec.num_kv_heads not in _GROUPS_WITHOUT_TENSOR_CORES
    return library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=uses_tensor_cores)


def _planned(
    wrapper: Any,
    view: CacheView,
    chosen: Sequences,
    spec: AttentionSpec,
    starts: torch.Tensor,
    entries: torch.Tensor,
    last_lengths: torch.Tensor,
    window_left: int,
) -> Any:
    """Tell the wrapper about the batch.

    Args:
        starts: [n + 1] int32 on the host: where each sequence's entries begin, and how many there are.
        entries: [all] int32: pages, one sequence's after the other's.
        last_lengths: [n] int32 on the host: keys in each sequence's last page.
    """
    page_size = view.keys.shape[1]
    common = {
        "sm_scale": spec.scale,
        "window_left": window_left,
        "logits_soft_cap": spec.softcap or 0.0,
        "q_data_type": view.keys.dtype,
        "kv_data_type": view.keys.dtype,
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


def _unsupported(spec: AttentionSpec, view: CacheView, library: Any, runs_on: str) -> str | None:
    if library is None:
        return "the package flashinfer is not installed"
    if spec.key_dim not in _HEAD_DIMS:
        return f"FlashInfer takes heads of {', '.join(map(str, _HEAD_DIMS))} numbers, not {spec.key_dim}"
    if view.keys.stride() != view.values.stride():
        return "FlashInfer takes keys and values with the same strides"
    return unsupported_device(view, runs_on) or unsupported_layer(spec, view)
