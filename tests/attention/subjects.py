"""The kernels under test: those that run here, and those of GPU libraries over fakes of the libraries.

On a GPU all that run there are tried too, with nothing to be set.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import flex_attention

from tests.attention.cases import BATCHES, BLOCK_SIZES, SPECS, views
from tests.attention.fake_libraries import (
    FLASHINFER,
    FakeFlashAttention2,
    FakeFlashAttention3,
    FakeFlashAttention4,
    FakeTorchFlash,
)
from tests.triton_here import HAS_GPU, RUNS_TRITON
from vattention.attention.eager import EagerKernel
from vattention.attention.flash_attention import (
    FlashAttention3Prompts,
    FlashAttentionKernel,
    FlashAttentionPagedKernel,
)
from vattention.attention.flash_attention_4 import FlashAttention4Prompts
from vattention.attention.flashinfer import FlashInferKernel, FlashInferPagedKernel
from vattention.attention.flex import FlexPrompts
from vattention.attention.kernel import AttentionKernel, RaggedBatch
from vattention.attention.prompts_apart import PromptsApart
from vattention.attention.registry import KERNELS
from vattention.attention.sequences import Sequences, SplitKernel
from vattention.attention.torch_flash import TorchFlashGatheredKernel, TorchFlashKernel, TorchFlashPagedKernel
from vattention.attention.triton_decode import TritonKernel, TritonPagedKernel
from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView, LayerView, PagedLayerView

READ_WHOLE_BLOCKS = ("flashinfer_paged_prompts", "flashinfer_paged", "flash_attention_paged", "torch_flash_paged")


@dataclass(frozen=True)
class Subject:
    """A kernel, where its cache lies, and what to try it on.

    Attributes:
        reads_whole_blocks: it multiplies by 0 what lies in a block before a window, so there may be no NaN.
    """

    kernel: AttentionKernel[Any]
    device: str = "cpu"
    batches: Collection[str] = frozenset(BATCHES)
    block_sizes: Collection[int] = BLOCK_SIZES
    dtypes: Collection[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
    reads_whole_blocks: bool = False

    def views(self, view: LayerView, batch: RaggedBatch, spec: AttentionSpec) -> list[CacheView]:
        """The cache in all forms in which the kernel can read it."""
        if view.keys.dtype not in self.dtypes:
            return []
        stored = views(self.kernel.reads, view, batch, spec, self.block_sizes)
        if self.reads_whole_blocks:
            stored = [replace(v, keys=v.keys.nan_to_num(7), values=v.values.nan_to_num(7)) for v in stored]
        return [form for form in stored if self.kernel.unsupported(spec, form) is None]

    def computes(self, spec: AttentionSpec, dtype: torch.dtype) -> bool:
        empty = (empty_view(self.kernel.reads, spec, dtype, self.device, size) for size in self.block_sizes)
        return dtype in self.dtypes and any(self.kernel.unsupported(spec, view) is None for view in empty)


def empty_view(
    kind: type[CacheView], spec: AttentionSpec, dtype: torch.dtype, device: str = "cpu", block_size: int = 16
) -> CacheView:
    keys, values = (
        torch.empty(1, block_size, spec.num_kv_heads, dim, dtype=dtype, device=device)
        for dim in (spec.key_dim, spec.value_dim)
    )
    if kind is LayerView:
        return LayerView(keys, values)
    return PagedLayerView(keys, values, torch.zeros(1, 1, dtype=torch.int32, device=device))


def _second() -> Any:
    return FakeFlashAttention2


def _third() -> Any:
    return FakeFlashAttention3


def _fourth() -> Any:
    return FakeFlashAttention4


def _nothing() -> None:
    return None


def _flashinfer() -> Any:
    return FLASHINFER


class EagerDecoder(SplitKernel[LayerView]):
    """For kernels that leave decoding to another, on every kind of layer."""

    uncapturable = EagerKernel.uncapturable

    def unsupported(self, spec: AttentionSpec, view: LayerView) -> str | None:
        return EagerKernel().unsupported(spec, view)

    def attend(
        self,
        query: torch.Tensor,
        view: LayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        return EagerKernel()(query, view, RaggedBatch(chosen.own_spans), spec, sinks)


def uncompiled_flex(*arguments: Any, **keywords: Any) -> Any:
    """FlexAttention by tensor operations. They do without the lists of blocks, which have tests of their own."""
    before = flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        return flex_attention.flex_attention(*arguments, **keywords)
    finally:
        flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


def _beside(
    name: str, prompts: SplitKernel[LayerView], decoder: SplitKernel[LayerView]
) -> AttentionKernel[LayerView]:
    return PromptsApart(name, LayerView, prompts, (decoder,))


def _subjects() -> dict[str, Subject]:
    found = {name: Subject(kernel) for name, kernel in KERNELS.items() if Subject(kernel).computes(*_PLAIN)}
    torch_flash = TorchFlashKernel(FakeTorchFlash(), "cpu")
    fakes: tuple[AttentionKernel[Any], ...] = (
        torch_flash,
        TorchFlashPagedKernel(FakeTorchFlash(), "cpu"),
        TorchFlashGatheredKernel(FakeTorchFlash(takes_tables=False), "cpu"),
        FlashAttentionKernel(_second, "cpu"),
        FlashAttentionPagedKernel(_second, _nothing, "cpu"),
        FlashInferKernel(_flashinfer, "cpu"),
        FlashInferPagedKernel(_flashinfer, "cpu"),
        _beside("flash_attention_3", FlashAttention3Prompts(_third, "cpu"), torch_flash),
        _beside("flash_attention_4", FlashAttention4Prompts(_fourth, "cpu"), EagerDecoder()),
        _beside("flashinfer_prompts", FlashInferKernel(_flashinfer, "cpu"), torch_flash),
        _beside("flex", FlexPrompts(uncompiled_flex, "cpu"), EagerDecoder()),
    )
    found |= {f"{kernel.name} (fake)": Subject(kernel) for kernel in fakes}
    found["flash_attention_paged (fake 3)"] = Subject(FlashAttentionPagedKernel(_nothing, _third, "cpu"))
    if RUNS_TRITON and not HAS_GPU:
        for kernel in (TritonKernel("cpu"), TritonPagedKernel("cpu")):
            # The interpreter's matrix products take bfloat16 for integers.
            found[f"{kernel.name} (interpreted)"] = Subject(
                kernel, "cpu", **_FEW, dtypes=(torch.float32, torch.float16)
            )
    if HAS_GPU:
        on_gpu = {
            name: Subject(kernel, "cuda", reads_whole_blocks=name in READ_WHOLE_BLOCKS)
            for name, kernel in KERNELS.items()
        }
        # All would be 600 kernels to compile.
        on_gpu |= {name: Subject(KERNELS[name], "cuda", **_FEW) for name in ("triton", "triton_paged")}
        # torch compiles one for each kind of layer, and takes seconds for it.
        on_gpu["flex"] = Subject(KERNELS["flex"], "cuda", ("mixed", "long chunks"), dtypes=(torch.bfloat16,))
        found |= {f"{name} (cuda)": subject for name, subject in on_gpu.items() if subject.computes(*_PLAIN)}
    return found


_PLAIN = (SPECS["wide"], torch.bfloat16)
_FEW: dict[str, Any] = {"batches": ("decodes", "mixed", "long decodes"), "block_sizes": (3, 16)}

SUBJECTS = _subjects()
