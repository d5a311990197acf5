"""Attention kernels by name, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch

from vattention.attention.compiled import NativeKernel, PagedKernel
from vattention.attention.eager import EagerKernel
from vattention.attention.flash_attention import (
    FlashAttention3Prompts,
    FlashAttentionKernel,
    FlashAttentionPagedKernel,
)
from vattention.attention.flash_attention_4 import FlashAttention4Prompts
from vattention.attention.flashinfer import FlashInferKernel, FlashInferPagedKernel
from vattention.attention.flex import FlexPrompts
from vattention.attention.gathered import GatheredKernel
from vattention.attention.kernel import AttentionKernel
from vattention.attention.prompts_apart import PromptsApart
from vattention.attention.sdpa import SdpaKernel
from vattention.attention.torch_flash import TorchFlashGatheredKernel, TorchFlashKernel, TorchFlashPagedKernel
from vattention.attention.triton_decode import TritonKernel, TritonPagedKernel
from vattention.core import AttentionSpec
from vattention.errors import ConfigError
from vattention.kv.manager import CacheView, LayerView, PagedLayerView

AUTO = "auto"
"""Not a kernel: take the fastest that can."""

_DECODERS = FlashAttentionKernel(), TorchFlashKernel(), TritonKernel()
"""They read exactly, and can be captured."""

KERNELS: MappingProxyType[str, AttentionKernel[Any]] = MappingProxyType(
    {
        kernel.name: kernel
        for kernel in (
            NativeKernel(),
            PromptsApart("flash_attention_3", LayerView, FlashAttention3Prompts(), _DECODERS),
            PromptsApart("flash_attention_4", LayerView, FlashAttention4Prompts(), _DECODERS),
            PromptsApart("flashinfer_prompts", LayerView, FlashInferKernel(), _DECODERS),
            FlashAttentionKernel(),
            TorchFlashKernel(),
            FlashInferKernel(),
            TritonKernel(),
            PromptsApart("flex", LayerView, FlexPrompts(), _DECODERS),
            SdpaKernel(),
            EagerKernel(),
            PagedKernel(),
            PromptsApart(
                "flashinfer_paged_prompts",
                PagedLayerView,
                FlashInferPagedKernel(),
                (FlashAttentionPagedKernel(), TorchFlashPagedKernel(), TritonPagedKernel()),
            ),
            FlashInferPagedKernel(),
            FlashAttentionPagedKernel(),
            TorchFlashPagedKernel(),
            TritonPagedKernel(),
            TorchFlashGatheredKernel(),
            GatheredKernel(),
        )
    }
)
"""All kernels; of those that read the same kind of view the fastest first, on GPUs as far as is known."""

View = TypeVar("View", bound=CacheView)

_KINDS = MappingProxyType({LayerView: "contiguous slots", PagedLayerView: "blocks"})


def choose(name: str, spec: AttentionSpec, view: View) -> AttentionKernel[View]:
    """The kernel called `name`, or with "auto" the fastest that computes such a layer over such a view.

    Raises:
        ConfigError: there is no such kernel, or it cannot compute the layer or read the view; the message names
            those that can.
    """
    reasons = {known: _unsupported(kernel, spec, view) for known, kernel in KERNELS.items()}
    able = [known for known, reason in reasons.items() if reason is None]
    wanted = able[0] if name == AUTO and able else name
    if wanted in able:
        return cast(AttentionKernel[View], KERNELS[wanted])
    if name == AUTO:
        said = "; ".join(f"{known}: {reason}" for known, reason in reasons.items())
        raise ConfigError(f"no attention kernel can compute this model's layers: {said}")
    check_name(name, able)
    raise ConfigError(
        f"attention={name!r} cannot compute this model's layers: {reasons[name]}; "
        f"choose {', '.join(map(repr, [AUTO, *able]))}"
    )


def check_name(name: str, able: Sequence[str]) -> None:
    """Raises:
    ConfigError: no kernel is called so; the message names those that are `able`.
    """
    if name not in (AUTO, *KERNELS):
        raise ConfigError(f"attention={name!r} is not known; choose {', '.join(map(repr, [AUTO, *able]))}")


def runnable(device: str) -> list[str]:
    """Names of the kernels that compute a plain layer in bfloat16 on "cpu" or "cuda", whatever they read."""
    if device == "cuda" and not torch.cuda.is_available():
        return []
    spec = AttentionSpec(8, 2, 64, 64, 0.125)
    tokens = torch.empty(1, 256, spec.num_kv_heads, spec.key_dim, dtype=torch.bfloat16, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    views: tuple[CacheView, ...] = LayerView(tokens, tokens), PagedLayerView(tokens, tokens, table)
    return [
        name for name, kernel in KERNELS.items() if any(_unsupported(kernel, spec, view) is None for view in views)
    ]


def _unsupported(kernel: AttentionKernel[Any], spec: AttentionSpec, view: CacheView) -> str | None:
    if not isinstance(view, kernel.reads):
        return f"it reads {_KINDS[kernel.reads]}, and this KV cache has {_KINDS[type(view)]}"
    return kernel.unsupported(spec, view)
