"""Attention over prompts through torch's FlexAttention (J. Dong et al., arXiv 2412.05496).

Compiled when it is needed, it computes what other stock kernels lack: soft-caps, sinks and windows in one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from vattention.attention.prompt_slices import PromptSlices
from vattention.attention.sequences import sent
from vattention.core import AttentionSpec
from vattention.kv.manager import LayerView

BLOCK = 128
"""Rows and keys of a block that is computed or left out as a whole."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_DIM = 16
_MOST_KERNELS = 64
_FARTHEST = 2**31
"""Numbers from a slot's first that the compiled kernel can count to."""


class FlexPrompts(PromptSlices):
    """FlexAttention for prompts over contiguous slots.

    Args:
        operator: called instead of the compiled function.
        runs_on: the type of device it is for.
    """

    def __init__(self, operator: Callable[..., Any] | None = None, runs_on: str = "cuda") -> None:
        self._operator = operator
        self._runs_on = runs_on

    def unsupported(self, spec: AttentionSpec, view: LayerView) -> str | None:
        device, dtype = view.keys.device, view.keys.dtype
        if device.type != self._runs_on:
            return f"it runs on {self._runs_on}, and this KV cache is on {device.type}"
        if dtype not in _DTYPES:
            return f"it takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if min(spec.key_dim, spec.value_dim) < _LEAST_DIM:
            return f"it takes heads of at least {_LEAST_DIM} numbers, not {min(spec.key_dim, spec.value_dim)}"
        if view.keys.shape[1] * max(view.keys.stride(1), view.values.stride(1)) >= _FARTHEST:
            return (
                f"tokens of a slot lie more than {_FARTHEST} numbers apart; kv_layout='per-layer' has them nearer"
            )
        return None

    def prompt(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        output, aux = (self._operator or _compiled())(
            # Strides that do not depend on a length let one compiled kernel serve all of them.
            *(tokens.transpose(0, 1).unsqueeze(0) for tokens in (query.contiguous(), keys, values)),
            score_mod=None if spec.softcap is None else _capped(spec.softcap, query.device),
            block_mask=block_mask(len(query), len(keys), window, query.device),
            scale=spec.scale,
            enable_gqa=spec.num_heads != spec.num_kv_heads,
            return_aux=AuxRequest(lse=sinks is not None),
            # torch's kernel for decoding, which it takes for few rows, has no tiles for some groups of heads.
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        )
        if sinks is not None:
            # A sink is one more term of the softmax's denominator.
            share = torch.sigmoid(aux.lse - sinks.float()[None, :, None])
            output = (output.float() * share.unsqueeze(3)).to(query.dtype)
        rows: torch.Tensor = output[0].transpose(0, 1)
        return rows


@cache
def _compiled() -> Callable[..., Any]:
    """For prompts of any length. A few lengths and each kind of layer have a kernel of their own."""
    compiled = torch.compile(flex_attention, dynamic=True)

    def call(*arguments: Any, **keywords: Any) -> Any:
        # Behind its limit torch would go on without compiling, and put all scores into memory. A patch for each
        # call, since one cannot be entered by two threads.
        with torch._dynamo.config.patch(recompile_limit=_MOST_KERNELS):
            return compiled(*arguments, **keywords)

    return call


@cache
def _capped(softcap: float, device: torch.device) -> Callable[..., torch.Tensor]:
    # A number would be a variable of the compiled kernel, which it has no place for.
    cap = torch.tensor(softcap, device=device)

    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return capped


class Blocks(NamedTuple):
    """Of each block of rows the blocks of keys that it reads, in ascending order.

    Attributes:
        num_partial, num_full: [row blocks] int32: blocks of which some and all keys are seen by all rows.
        partial, full: [row blocks, key blocks] int32, entries behind those counts mean nothing.

    There are at least two blocks of rows and of keys: torch compiles anew where a size is 1.
    """

    num_partial: np.ndarray[Any, np.dtype[np.int32]]
    partial: np.ndarray[Any, np.dtype[np.int32]]
    num_full: np.ndarray[Any, np.dtype[np.int32]]
    full: np.ndarray[Any, np.dtype[np.int32]]


def blocks(num_rows: int, num_keys: int, window: int | None) -> Blocks:
    """Blocks under a causal mask aligned at the lower right, with a window or none."""
    first_rows = np.arange(0, num_rows, BLOCK)
    low = num_keys - num_rows + first_rows
    high = num_keys - num_rows + np.minimum(first_rows + BLOCK, num_rows) - 1
    seen = num_keys if window is None else window
    begin = np.maximum(low - seen + 1, 0) // BLOCK
    end = high // BLOCK + 1
    # All rows see what lies from the last row's first key to the first row's last.
    full_begin = -(-np.maximum(high - seen + 1, 0) // BLOCK)
    full_end = np.maximum((low + 1) // BLOCK, full_begin)
    none = full_end == full_begin
    full_begin, full_end = np.where(none, end, full_begin), np.where(none, end, full_end)
    before = full_begin - begin
    num_partial, num_full = before + end - full_end, full_end - full_begin
    at = np.arange(max(-(-num_keys // BLOCK), 2))[None]
    partial = np.where(at < before[:, None], begin[:, None] + at, full_end[:, None] + at - before[:, None])
    full = full_begin[:, None] + at
    # Row blocks without any keys, where there would be one.
    more = [(0, max(2 - len(first_rows), 0))]
    counts = (np.pad(count, more) for count in (num_partial, num_full))
    entries = (np.pad(some, [*more, (0, 0)]) for some in (partial, full))
    return Blocks(*(numbers.astype(np.int32) for pair in zip(counts, entries, strict=True) for numbers in pair))


def block_mask(num_rows: int, num_keys: int, window: int | None, device: torch.device) -> BlockMask:
    """`blocks` for FlexAttention; what differs between prompts is in tensors, lest it be compiled anew."""
    offset, seen = sent([num_keys - num_rows, num_keys if window is None else window], torch.int32, device)

    def sees(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        visible: torch.Tensor = (key <= row + offset) & (key > row + offset - seen)
        return visible

    found = (sent(numbers[None, None], torch.int32, device) for numbers in blocks(num_rows, num_keys, window))
    num_partial, partial, num_full, full = found
    return BlockMask.from_kv_blocks(
        num_partial,
        partial,
        num_full,
        full,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(num_rows, num_keys),
        compute_q_blocks=False,
    )
