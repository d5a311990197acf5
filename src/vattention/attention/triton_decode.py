"""Attention by kernels of our own on a GPU, which need nothing but Triton: the fallback where no library is.

Decoding sequences go through `triton_kernels`; those that bring many rows through torch's FlashAttention where that
can compute the layer, else through torch's kernels as elsewhere.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from vattention.attention.gathered import attend_long, gather
from vattention.attention.sequences import Sequences, SplitKernel
from vattention.attention.torch_flash import TorchFlashGatheredKernel, TorchFlashKernel
from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView, LayerView, PagedLayerView

MOST_SPLITS = 64
"""Parts of one sequence's keys; a power of two."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_WIDTH = 16
"""Triton's matrix products take no fewer rows, columns or numbers."""
_MOST_ROWS = 64
_MOST_STRIP = 64
_STRIP_NBYTES = 2**14
"""Of a strip's keys: 64 keys of 128 numbers in bfloat16. Some such strips are on their way at a time."""
_PROGRAMS_PER_PROCESSOR = 4
_LEAST_KEYS = 256
"""Of a part: with fewer, putting parts together costs more than it gains."""


class TritonKernel(SplitKernel[LayerView]):
    """The Triton kernel over contiguous slots.

    Args:
        runs_on: the type of device; "cpu" under Triton's interpreter, for tests.
        prompts: for sequences that bring many rows, where it can.
    """

    name = "triton"
    reads = LayerView

    def __init__(self, runs_on: str = "cuda", prompts: SplitKernel[LayerView] | None = None) -> None:
        self._runs_on = runs_on
        self._prompts = prompts or TorchFlashKernel()

    def unsupported(self, spec: AttentionSpec, view: LayerView) -> str | None:
        return unsupported(spec, view, self._runs_on)

    def attend(
        self,
        query: torch.Tensor,
        view: LayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if chosen.is_decode:
            return decode(query, view, chosen, spec, sinks)
        if self._prompts.unsupported(spec, view) is None:
            return self._prompts.attend(query, view, chosen, spec, sinks)
        output = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        for span in chosen.own_spans:
            attend_long(query, view, span, spec, sinks, output)
        return output


class TritonPagedKernel(SplitKernel[PagedLayerView]):
    """The same kernel with an address looked up for each key; blocks of the others are copied side by side.

    Args:
        runs_on, prompts: as of `TritonKernel`.
    """

    name = "triton_paged"
    reads = PagedLayerView

    def __init__(self, runs_on: str = "cuda", prompts: SplitKernel[PagedLayerView] | None = None) -> None:
        self._runs_on = runs_on
        self._prompts = prompts or TorchFlashGatheredKernel()

    def unsupported(self, spec: AttentionSpec, view: PagedLayerView) -> str | None:
        return unsupported(spec, view, self._runs_on)

    def attend(
        self,
        query: torch.Tensor,
        view: PagedLayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if chosen.is_decode:
            return decode(query, view, chosen, spec, sinks)
        if self._prompts.unsupported(spec, view) is None:
            return self._prompts.attend(query, view, chosen, spec, sinks)
        output = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        for span in chosen.own_spans:
            attend_long(query, *gather(view, span, spec.window), spec, sinks, output)
        return output


def unsupported(spec: AttentionSpec, view: CacheView, runs_on: str) -> str | None:
    """Why the Triton kernel cannot read such a cache, or None if it can."""
    device, dtype = view.keys.device, view.keys.dtype
    if device.type != runs_on:
        return f"it runs on {runs_on}, and this KV cache is on {device.type}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in _DTYPES:
        return f"the Triton kernel takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if max(spec.key_dim, spec.value_dim) > 256:
        return f"the Triton kernel takes heads of at most 256 numbers, not {max(spec.key_dim, spec.value_dim)}"
    return None


def decode(
    query: torch.Tensor,
    view: CacheView,
    chosen: Sequences,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[n, num_heads, value_dim] of sequences that bring one row each."""
    # Triton launches on the thread's current device.
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        return _decode(query, view, chosen, spec, sinks)


def _decode(
    query: torch.Tensor,
    view: CacheView,
    chosen: Sequences,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    kernels = _kernels()
    count = len(chosen)
    tables, block_size = (view.tables, view.block_size) if isinstance(view, PagedLayerView) else (chosen.slots, 0)
    group = spec.num_heads // spec.num_kv_heads
    key_width, value_width = (max(_LEAST_WIDTH, _power_above(dim)) for dim in (spec.key_dim, spec.value_dim))
    num_rows = min(max(_LEAST_WIDTH, _power_above(group)), _MOST_ROWS)
    num_programs = spec.num_kv_heads * -(-group // num_rows)
    num_splits = splits(chosen.most_keys, count * num_programs, processors(query.device))
    output = query.new_empty(count, spec.num_heads, spec.value_dim)
    # Without parts there is nothing to be put together, and nothing is written there.
    shape = (count, spec.num_heads, num_splits) if num_splits > 1 else (0, 0, 0)
    parts = query.new_empty(*shape, spec.value_dim, dtype=torch.float32)
    maxima, sums = (query.new_empty(shape, dtype=torch.float32) for _ in "ms")
    logits = output if sinks is None else sinks.float().contiguous()
    keys, values = view.keys.data_ptr(), view.values.data_ptr()
    kernels.partial_attention[(count, num_programs, num_splits)](
        query,
        keys,
        values,
        tables,
        chosen.slots,
        chosen.first_keys,
        chosen.end_keys,
        logits,
        output,
        parts,
        maxima,
        sums,
        spec.scale,
        spec.softcap or 0.0,
        query.stride(0),
        query.stride(1),
        *view.keys.stride()[:3],
        *view.values.stride()[:3],
        tables.stride(0),
        group=group,
        key_dim=spec.key_dim,
        value_dim=spec.value_dim,
        key_width=key_width,
        value_width=value_width,
        num_rows=num_rows,
        strip=strip(max(key_width, value_width), view.keys.dtype),
        num_splits=num_splits,
        block_size=block_size,
        has_softcap=spec.softcap is not None,
        has_sinks=sinks is not None,
        is_aligned=not (keys | values) % 16,
    )
    if num_splits > 1:
        kernels.join_parts[(count, spec.num_heads)](
            parts,
            maxima,
            sums,
            logits,
            output,
            value_dim=spec.value_dim,
            value_width=value_width,
            num_splits=num_splits,
            has_sinks=sinks is not None,
        )
    return output


def splits(most_keys: int, num_programs: int, num_processors: int) -> int:
    """Parts to cut each sequence's keys into: a power of two.

    Args:
        num_programs: without parts.
        num_processors: of the GPU; some programs for each keep them busy.
    """
    wanted = -(-_PROGRAMS_PER_PROCESSOR * num_processors // num_programs)
    possible = max(1, most_keys // _LEAST_KEYS)
    return min(_power_above(wanted), 1 << possible.bit_length() - 1, MOST_SPLITS)


def strip(width: int, dtype: torch.dtype) -> int:
    """Keys to take the softmax of at a time."""
    return max(_LEAST_WIDTH, min(_MOST_STRIP, _STRIP_NBYTES // (width * dtype.itemsize)))


def _power_above(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; where the interpreter runs, as many as of a small one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from vattention.attention import triton_kernels

    return triton_kernels
