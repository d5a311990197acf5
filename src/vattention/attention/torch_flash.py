"""Attention through the FlashAttention-2 that torch itself ships for GPUs, all sequences of a kind in one call.

The call is `aten::_flash_attention_forward` with `cum_seq_k` and `seqused_k`, which torch 2.11 to 2.13 have alike;
`torch.nn.attention.varlen.varlen_attn` (torch 2.10 and later) makes the same call, and not all of these versions
hand `seqused_k` through. Where sequences begin and how many of their keys count are two tensors, and of the
beginnings the kernel reads nothing but where a sequence begins: so the whole cache can be one row of tokens, and
slots come in any order.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch

from vattention.attention.libraries import unsupported_device, unsupported_layer
from vattention.attention.sequences import Sequences, SplitKernel, sent, tables
from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView, LayerView, PagedLayerView

PAGE_TOKENS = 256
"""FlashAttention-2's blocks hold a multiple of so many tokens."""


class TorchFlashKernel(SplitKernel[LayerView]):
    """Torch's FlashAttention over contiguous slots, read in place.

    A decoding sequence sees all from its first key to its last, so that no mask is asked for, not under a window
    either: only without one does the kernel read keys once for all query heads that share them, and split them.

    Args:
        operator: called instead of torch's.
        runs_on: the type of device it is for.
    """

    name = "torch_flash"
    reads = LayerView

    def __init__(self, operator: Any = None, runs_on: str = "cuda") -> None:
        self._operator = operator or torch.ops.aten._flash_attention_forward
        self._runs_on = runs_on

    def unsupported(self, spec: AttentionSpec, view: LayerView) -> str | None:
        return _unsupported(spec, view, self._runs_on)

    def attend(
        self,
        query: torch.Tensor,
        view: LayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        max_len = view.keys.shape[1]
        # [n + 1], as the call wants it; the last is not used.
        key_starts = chosen.once(("starts", max_len), lambda: chosen.numbers[0] * max_len + chosen.numbers[1])
        keys, values = (tokens.view(-1, *tokens.shape[2:]) for tokens in (view.keys, view.values))
        return _attend(self._operator, query, keys, values, key_starts, chosen, spec)


class TorchFlashPagedKernel(SplitKernel[PagedLayerView]):
    """The same over blocks of a multiple of 256 tokens, where torch's call takes tables (torch 2.12 and later).

    Args:
        operator: called instead of torch's.
        runs_on: the type of device it is for.
    """

    name = "torch_flash_paged"
    reads = PagedLayerView

    def __init__(self, operator: Any = None, runs_on: str = "cuda") -> None:
        self._operator = operator or torch.ops.aten._flash_attention_forward
        self._runs_on = runs_on

    def unsupported(self, spec: AttentionSpec, view: PagedLayerView) -> str | None:
        if not _takes_tables(self._operator):
            return f"the FlashAttention of torch {torch.__version__} takes no block tables"
        if view.block_size % PAGE_TOKENS:
            return f"it takes blocks of a multiple of {PAGE_TOKENS} tokens, not {view.block_size}"
        return _unsupported(spec, view, self._runs_on)

    def attend(
        self,
        query: torch.Tensor,
        view: PagedLayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        found = tables(view, chosen)
        is_whole = chosen.is_decode and found.window_left < 0
        output: torch.Tensor = self._operator(
            query,
            view.keys,
            view.values,
            chosen.row_starts,
            # Only its size counts where there are tables and lengths.
            chosen.row_starts,
            chosen.most_rows,
            found.most_keys,
            0.0,
            not is_whole,
            False,
            scale=spec.scale,
            window_size_left=found.window_left,
            window_size_right=-1 if is_whole else 0,
            seqused_k=found.num_keys,
            block_table=found.blocks,
        )[0]
        return output


class TorchFlashGatheredKernel(SplitKernel[PagedLayerView]):
    """The same over copies of blocks, all sequences' one behind the other: for blocks of any size and any torch.

    The copy is worth its price where many rows read it, which are prompts.

    Args:
        operator: called instead of torch's.
        runs_on: the type of device it is for.
    """

    name = "torch_flash_gathered"
    reads = PagedLayerView
    uncapturable = "it copies as many tokens as the host says"

    def __init__(self, operator: Any = None, runs_on: str = "cuda") -> None:
        self._operator = operator or torch.ops.aten._flash_attention_forward
        self._runs_on = runs_on

    def unsupported(self, spec: AttentionSpec, view: PagedLayerView) -> str | None:
        return _unsupported(spec, view, self._runs_on)

    def attend(
        self,
        query: torch.Tensor,
        view: PagedLayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        # What is kept holds on to the table, so that no other can have its id.
        found = chosen.once(("copied", id(view.tables), view.block_size), lambda: _found(view, chosen))
        keys, values = (pool[found.blocks, found.tokens] for pool in (view.keys, view.values))
        return _attend(self._operator, query, keys, values, found.starts, chosen, spec)


class _Found(NamedTuple):
    """Where the keys of some sequences are, m in all.

    Attributes:
        table: that of all slots.
        blocks, tokens: [m] int64: each key's block, and its place there.
        starts: [n + 1] int32: keys before each sequence's, and all of them.
    """

    table: torch.Tensor
    blocks: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor


def _found(view: PagedLayerView, chosen: Sequences) -> _Found:
    device, total = view.tables.device, sum(chosen.lengths)
    starts = sent([0, *accumulate(chosen.lengths)], torch.int32, device)
    sequence = torch.repeat_interleave(torch.arange(len(chosen), device=device), chosen.num_keys, output_size=total)
    positions = torch.arange(total, device=device) + (chosen.first_keys - starts[:-1])[sequence]
    blocks = view.tables[chosen.slots[sequence], positions // view.block_size].long()
    return _Found(view.tables, blocks, positions % view.block_size, starts)


def _attend(
    operator: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_starts: torch.Tensor,
    chosen: Sequences,
    spec: AttentionSpec,
) -> torch.Tensor:
    """[R, num_heads, value_dim] over tokens in one row.

    Args:
        keys, values: [tokens, num_kv_heads, dim].
        key_starts: [n + 1] int32: where each sequence's first key is; the last is not used.
    """
    output: torch.Tensor = operator(
        query,
        keys,
        values,
        chosen.row_starts,
        key_starts,
        chosen.most_rows,
        chosen.most_keys,
        0.0,
        not chosen.is_decode,
        False,
        scale=spec.scale,
        window_size_left=chosen.window_left,
        window_size_right=-1 if chosen.is_decode else 0,
        seqused_k=chosen.num_keys,
    )[0]
    return output


def _unsupported(spec: AttentionSpec, view: CacheView, runs_on: str) -> str | None:
    if spec.softcap is not None:
        return "torch's FlashAttention has no soft-cap on scores"
    return unsupported_device(view, runs_on) or unsupported_layer(spec, view)


def _takes_tables(operator: Any) -> bool:
    arguments = operator.default._schema.arguments
    return any(argument.name == "block_table" for argument in arguments)
