"""Attention by the compiled kernels: a call for all sequences with few rows, and one for those with many."""

from __future__ import annotations

from functools import lru_cache

import torch

from vattention.attention.gathered import attend_long, gather
from vattention.attention.kernel import RaggedBatch
from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView, LayerView, PagedLayerView
from vattention.native import AttentionCache, AttentionHeads, Int64s, Kernels, kernels

STRIP_KEYS = 128
"""Keys whose softmax is taken at a time, and the least that a thread computes; attend.c takes no more."""

SHORT_ROWS = 1
"""Most query rows of a sequence that native/attend.c takes; matrix products are faster with more."""


class CompiledKernel:
    """native/attend.c for sequences with few rows; for those with many native/prefill.c where the processor has
    matrix tiles, elsewhere torch's kernels.

    Keys and values are read once for all query heads that share them. All threads take equal shares of the whole
    batch's keys, however the sequences' lengths differ.

    Args:
        strip_keys: a multiple of 16, at most `STRIP_KEYS`.
    """

    uncapturable = "it runs on processors"

    def __init__(self, strip_keys: int = STRIP_KEYS) -> None:
        self._strip_keys = strip_keys

    def unsupported(self, spec: AttentionSpec, view: CacheView) -> str | None:
        return unsupported(view.keys.dtype, view.keys.device)

    def cache(self, view: CacheView) -> AttentionCache:
        """The view as the compiled code takes it, good as long as the view."""
        return AttentionCache(view.keys, view.values, view.tables if isinstance(view, PagedLayerView) else None)

    def heads(self, spec: AttentionSpec) -> AttentionHeads:
        """The layer as the compiled code takes it."""
        return _heads(spec, self._strip_keys)

    def _prefill(
        self, query: torch.Tensor, view: CacheView, spans: Int64s, spec: AttentionSpec, output: torch.Tensor
    ) -> bool:
        """Compute spans of many rows by matrix tiles; whether this processor has them for such a layer."""
        compiled, heads = kernels(), self.heads(spec)
        if compiled is None or spec.has_sinks or not compiled.attention.can_prefill(heads, view.keys.dtype):
            return False
        rows = query if query.stride(-1) == 1 else query.contiguous()
        compiled.attention.prefill(heads, self.cache(view), rows, spans, output)
        return True


class NativeKernel(CompiledKernel):
    """The compiled kernel over contiguous slots, read in place."""

    name = "native"
    reads = LayerView

    def __call__(
        self,
        query: torch.Tensor,
        view: LayerView,
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        parts = batch.parts(SHORT_ROWS)
        output = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        if len(parts.short):
            attend_short(query, self.cache(view), parts.short, self.heads(spec), sinks, output)
        if parts.long and not self._prefill(query, view, parts.long_spans, spec, output):
            for span in parts.long:
                attend_long(query, view, span, spec, sinks, output)
        return output


class PagedKernel(CompiledKernel):
    """The same over block tables: the same reads in the same order, with an address looked up for each block.

    Without matrix tiles the blocks of sequences with many rows are copied side by side, for torch's kernels.
    """

    name = "paged"
    reads = PagedLayerView

    def __call__(
        self,
        query: torch.Tensor,
        view: PagedLayerView,
        batch: RaggedBatch,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        parts = batch.parts(SHORT_ROWS)
        output = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        if len(parts.short):
            attend_short(query, self.cache(view), parts.short, self.heads(spec), sinks, output)
        if parts.long and not self._prefill(query, view, parts.long_spans, spec, output):
            for span in parts.long:
                attend_long(query, *gather(view, span, spec.window), spec, sinks, output)
        return output


def unsupported(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the compiled kernel cannot read such a cache, or None if it can."""
    if device.type != "cpu":
        return f"the compiled kernels run on processors, not on {device.type}"
    if dtype not in Kernels.cache_dtypes:
        names = ", ".join(sorted(str(known).removeprefix("torch.") for known in Kernels.cache_dtypes))
        return f"the compiled kernels take {names}, not {str(dtype).removeprefix('torch.')}"
    if kernels() is None:
        return "the compiled kernels were not built, or do not run here"
    return None


def attend_short(
    query: torch.Tensor,
    cache: AttentionCache,
    spans: Int64s,
    heads: AttentionHeads,
    sinks: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Compute the spans' rows of `output` [T, num_heads, value_dim], the rest as in `AttentionKernel`."""
    compiled = kernels()
    if compiled is None:
        raise RuntimeError("there are no compiled kernels here: `unsupported` says so beforehand")
    rows = query if query.stride(-1) == 1 else query.contiguous()
    logits = None if sinks is None else sinks.float().contiguous()
    precise = output.float() if output.dtype == torch.float16 else output
    compiled.attention.attend(heads, cache, rows, spans, logits, precise)
    if precise is not output:
        output.copy_(precise)


@lru_cache(maxsize=256)
def _heads(spec: AttentionSpec, strip_keys: int) -> AttentionHeads:
    return AttentionHeads(
        spec.num_heads,
        spec.num_kv_heads,
        spec.key_dim,
        spec.value_dim,
        spec.window or 0,
        strip_keys,
        spec.scale,
        spec.softcap or 0.0,
    )
