"""Attention over prompts through FlashAttention-4: the package `flash-attn-4`, whose module is `flash_attn.cute`.

Written after version 4.0.0b36. It is Python that compiles its kernels by itself, for Hopper GPUs and later ones.
Queries are [n, rows, heads, dim]; windows are pairs (left, right), the row's own key not counted, None for no
limit; causal masks are aligned at the lower right.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from vattention.attention.libraries import HALVES, installed
from vattention.attention.prompt_slices import PromptSlices
from vattention.core import AttentionSpec
from vattention.kv.manager import LayerView

_HOPPER, _BLACKWELL = 9, 10


def _fourth() -> Any:
    # Version 2 has the name flash_attn too, and no such part; looking for one imports the whole.
    there = installed("flash_attn") is not None and find_spec("flash_attn.cute") is not None
    return installed("flash_attn.cute") if there else None


class FlashAttention4Prompts(PromptSlices):
    """FlashAttention-4 for prompts over contiguous slots.

    Args:
        library: gives what is called instead of `flash_attn.cute`.
        runs_on: the type of device it is for.
    """

    def __init__(self, library: Callable[[], Any] = _fourth, runs_on: str = "cuda") -> None:
        self._library = library
        self._runs_on = runs_on

    def unsupported(self, spec: AttentionSpec, view: LayerView) -> str | None:
        device, dtype = view.keys.device, view.keys.dtype
        if device.type != self._runs_on:
            return f"it runs on {self._runs_on}, and this KV cache is on {device.type}"
        if dtype not in HALVES:
            return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else _HOPPER
        if generation < _HOPPER:
            return f"it needs a Hopper GPU or a later one, and {device} is older"
        dims = spec.key_dim, spec.value_dim
        if any(dim % 8 or not 8 <= dim <= _most_numbers(generation) for dim in dims):
            return f"it takes heads of a multiple of 8 numbers, at most {_most_numbers(generation)}, not {dims}"
        # Last: importing a package takes seconds, and elsewhere it is of no use.
        return None if self._library() is not None else "the package flash-attn-4 is not installed"

    def prompt(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        found = self._library().flash_attn_func(
            query.unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            softmax_scale=spec.scale,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
            learnable_sink=None if sinks is None else sinks.float(),
            softcap=spec.softcap or 0.0,
        )
        # Versions differ in whether the logarithms of denominators come along.
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return output.squeeze(0)


def _most_numbers(generation: int) -> int:
    return 256 if generation < _BLACKWELL else 128
