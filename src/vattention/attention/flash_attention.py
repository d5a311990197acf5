"""Attention through the FlashAttention packages: `flash_attn` 2.7 and later, and `flash_attn_interface`, version 3.

Written after `flash_attn_with_kvcache` of both in the state of August 2026 (package 2.8.4). Queries are [n, rows,
heads, dim]; keys and values [slots, tokens, heads, dim], or [blocks, tokens, heads, dim] with a table; windows are
pairs (left, right), the row's own key not counted, -1 for no limit; causal masks are aligned at the lower right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vattention.attention.libraries import installed, unsupported_device, unsupported_layer
from vattention.attention.prompt_slices import PromptSlices, each_prompt
from vattention.attention.sequences import Sequences, SplitKernel, tables
from vattention.attention.torch_flash import PAGE_TOKENS
from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView, LayerView, PagedLayerView

Library = Callable[[], Any]
"""Returns a module, or None where it is not installed."""

_second: Library = partial(installed, "flash_attn")
_third: Library = partial(installed, "flash_attn_interface")


class FlashAttentionKernel(SplitKernel[LayerView]):
    """FlashAttention-2 over contiguous slots: decoding sequences in one call, each of the others in its own.

    Rows before a window are left out as padding on the left, so that decoding needs no mask and the kernel reads
    keys once for all query heads that share them. The others get a slice of the cache, which takes the kernel for
    prompts instead of that for splits.

    Args:
        library: gives what is called instead of `flash_attn`.
        runs_on: the type of device it is for.
    """

    name = "flash_attention"
    reads = LayerView

    def __init__(self, library: Library = _second, runs_on: str = "cuda") -> None:
        self._library = library
        self._runs_on = runs_on

    def unsupported(self, spec: AttentionSpec, view: LayerView) -> str | None:
        return _unsupported(spec, view, self._library, "flash_attn", self._runs_on)

    def attend(
        self,
        query: torch.Tensor,
        view: LayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        call = self._library().flash_attn_with_kvcache
        if not chosen.is_decode:
            return each_prompt(query, view, chosen, partial(_prompt, spec=spec, call=call))
        output: torch.Tensor = call(
            query.unsqueeze(1),
            view.keys,
            view.values,
            cache_seqlens=chosen.end_keys,
            cache_batch_idx=chosen.slots,
            cache_leftpad=chosen.first_keys if any(chosen.begins) else None,
            softmax_scale=spec.scale,
            causal=False,
            softcap=spec.softcap or 0.0,
        )
        return output.squeeze(1)


class FlashAttention3Prompts(PromptSlices):
    """FlashAttention-3 for prompts over contiguous slots, on Hopper GPUs.

    Args:
        library: gives what is called instead of `flash_attn_interface`.
        runs_on: the type of device it is for.
    """

    def __init__(self, library: Library = _third, runs_on: str = "cuda") -> None:
        self._library = library
        self._runs_on = runs_on

    def unsupported(self, spec: AttentionSpec, view: LayerView) -> str | None:
        return _unsupported(spec, view, self._library, "flash_attn_interface", self._runs_on)

    def prompt(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        return _prompt(query, keys, values, window, spec, self._library().flash_attn_with_kvcache)


class FlashAttentionPagedKernel(SplitKernel[PagedLayerView]):
    """FlashAttention over blocks: version 3 where it is installed, else version 2, for blocks of 256 tokens.

    Args:
        second, third: give what is called instead of `flash_attn` and `flash_attn_interface`.
        runs_on: the type of device it is for.
    """

    name = "flash_attention_paged"
    reads = PagedLayerView

    def __init__(self, second: Library = _second, third: Library = _third, runs_on: str = "cuda") -> None:
        self._second, self._third = second, third
        self._runs_on = runs_on

    def unsupported(self, spec: AttentionSpec, view: PagedLayerView) -> str | None:
        reason = _unsupported(spec, view, lambda: self._third() or self._second(), "flash_attn", self._runs_on)
        if reason is None and view.block_size % PAGE_TOKENS and self._third() is None:
            return f"FlashAttention-2 takes blocks of a multiple of {PAGE_TOKENS} tokens, not {view.block_size}"
        return reason

    def attend(
        self,
        query: torch.Tensor,
        view: PagedLayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        found, third = tables(view, chosen), self._third()
        is_whole = chosen.is_decode and found.window_left < 0
        common = {
            "softmax_scale": spec.scale,
            "causal": not is_whole,
            "window_size": (found.window_left, -1 if is_whole else 0),
            "softcap": spec.softcap or 0.0,
        }
        if third is not None:
            output: torch.Tensor = third.flash_attn_with_kvcache(
                query,
                view.keys,
                view.values,
                cache_seqlens=found.num_keys,
                page_table=found.blocks,
                cu_seqlens_q=chosen.row_starts,
                max_seqlen_q=chosen.most_rows,
                **common,
            )
            return output
        call = self._second().flash_attn_with_kvcache
        if chosen.is_decode:
            output = call(
                query.unsqueeze(1),
                view.keys,
                view.values,
                cache_seqlens=found.num_keys,
                block_table=found.blocks,
                **common,
            )
            return output.squeeze(1)
        return torch.cat(
            [
                call(
                    query[first_row : first_row + num_rows].unsqueeze(0),
                    view.keys,
                    view.values,
                    cache_seqlens=found.num_keys[i : i + 1],
                    block_table=found.blocks[i : i + 1],
                    **common,
                ).squeeze(0)
                for i, (_, first_row, num_rows, _) in enumerate(chosen.own_spans)
            ]
        )


def _prompt(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    spec: AttentionSpec,
    call: Any,
) -> torch.Tensor:
    """`PromptSlices.prompt` by the function that versions 2 and 3 have."""
    output: torch.Tensor = call(
        query.unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        softmax_scale=spec.scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=spec.softcap or 0.0,
    )
    return output.squeeze(0)


def _unsupported(spec: AttentionSpec, view: CacheView, library: Library, name: str, runs_on: str) -> str | None:
    # The device first: importing a package takes seconds, and elsewhere it is of no use.
    reason = unsupported_device(view, runs_on) or unsupported_layer(spec, view)
    # The name flash_attn alone may be that of version 4, which has other functions.
    if reason is None and getattr(library(), "flash_attn_with_kvcache", None) is None:
        return f"the package {name} is not installed"
    return reason
