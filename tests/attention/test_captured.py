"""Kernels on a tape: captured with some sequences, replayed with others, over fakes of the libraries."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.attention.cases import SPECS, filled, views
from tests.attention.fake_libraries import FLASHINFER, FakeFlashAttention2, FakeFlashAttention3, FakeTorchFlash
from tests.attention.reference import attend
from tests.attention.test_kernels import TOLERANCE
from tests.model.fake_graphs import FakeCapture
from vattention.attention.fixed_batch import fixed_batch
from vattention.attention.flash_attention import (
    FlashAttention3Prompts,
    FlashAttentionKernel,
    FlashAttentionPagedKernel,
)
from vattention.attention.flashinfer import FlashInferKernel
from vattention.attention.kernel import AttentionKernel
from vattention.attention.prompts_apart import PromptsApart
from vattention.attention.torch_flash import TorchFlashKernel, TorchFlashPagedKernel
from vattention.kv.manager import LayerView

MOST_KEYS = 300


class Launched:
    """Torch's operator, inside which the tape does not look."""

    def __init__(self, capture: FakeCapture) -> None:
        operator = FakeTorchFlash()
        self.default = operator.default
        self._call = capture.opaque(operator)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._call(*arguments, **keywords)


def library(capture: FakeCapture, module: Any) -> Callable[[], Any]:
    call = capture.opaque(module.flash_attn_with_kvcache)
    return lambda: SimpleNamespace(flash_attn_with_kvcache=call)


def nothing() -> None:
    return None


KERNELS: dict[str, Callable[[FakeCapture], AttentionKernel[Any]]] = {
    "torch_flash": lambda c: TorchFlashKernel(Launched(c), "cpu"),
    "torch_flash_paged": lambda c: TorchFlashPagedKernel(Launched(c), "cpu"),
    "flash_attention": lambda c: FlashAttentionKernel(library(c, FakeFlashAttention2), "cpu"),
    "flash_attention_3": lambda c: PromptsApart(
        "flash_attention_3",
        LayerView,
        FlashAttention3Prompts(library(c, FakeFlashAttention3), "cpu"),
        (TorchFlashKernel(Launched(c), "cpu"),),
    ),
    "flashinfer_prompts": lambda c: PromptsApart(
        "flashinfer_prompts",
        LayerView,
        FlashInferKernel(lambda: FLASHINFER, "cpu"),
        (TorchFlashKernel(Launched(c), "cpu"),),
    ),
    "flash_attention_paged, 2": lambda c: FlashAttentionPagedKernel(
        library(c, FakeFlashAttention2), nothing, "cpu"
    ),
    "flash_attention_paged, 3": lambda c: FlashAttentionPagedKernel(
        nothing, library(c, FakeFlashAttention3), "cpu"
    ),
}


@pytest.mark.parametrize("spec_name", ["wide", "wide, window"])
@pytest.mark.parametrize("name", KERNELS)
def test_replays_follow_slots_and_positions(name: str, spec_name: str) -> None:
    capture, spec, dtype = FakeCapture(), SPECS[spec_name], torch.bfloat16
    kernel = KERNELS[name](capture)
    query, view, batch, _ = filled(spec, ((MOST_KEYS - 1, 1), (40, 1), (3, 1), (127, 1)), dtype)
    expected = attend(query, view, batch, spec)
    # Sequences that end where they did, in another order of the rows.
    slots, positions = batch.slots.clone(), batch.positions.clone()
    rows, result = query.clone(), torch.zeros_like(query)
    (stored,) = views(kernel.reads, view, batch, spec, (256,))

    def step() -> None:
        fixed = fixed_batch(slots, positions, MOST_KEYS, {spec.window})
        result.copy_(kernel(rows, stored, fixed, spec, None))

    with torch.inference_mode():
        replay = capture(step)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 2, 1]):
        slots.copy_(batch.slots[order])
        positions.copy_(batch.positions[order])
        rows.copy_(query[order])
        replay()
        torch.testing.assert_close(result.double(), expected[order], atol=TOLERANCE[dtype], rtol=0)


def test_a_kernel_that_plans_on_the_host_cannot() -> None:
    capture, spec = FakeCapture(), SPECS["wide"]
    kernel = FlashInferKernel(lambda: FLASHINFER, "cpu")
    query, view, batch, _ = filled(spec, ((20, 1), (3, 1)), torch.bfloat16)
    assert kernel.uncapturable is not None

    def step() -> None:
        kernel(query, view, fixed_batch(batch.slots, batch.positions, 21, {None}), spec, None)

    with torch.inference_mode(), pytest.raises((RuntimeError, AssertionError)):
        capture(step)
