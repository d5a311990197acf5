"""The Triton kernel: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.attention.cases import BATCHES, SPECS, filled, in_blocks
from tests.attention.fake_libraries import FakeTorchFlash
from tests.attention.reference import attend
from tests.attention.subjects import empty_view
from tests.triton_here import HAS_GPU, HAS_TRITON, RUNS_TRITON
from vattention.attention import triton_decode
from vattention.attention.sequences import sequences
from vattention.attention.torch_flash import TorchFlashGatheredKernel, TorchFlashKernel
from vattention.attention.triton_decode import MOST_SPLITS, TritonKernel, TritonPagedKernel, splits
from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView, LayerView

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
runs_triton = pytest.mark.skipif(not RUNS_TRITON, reason="there is no Triton, or its interpreter is too old")

DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCE = 2e-5 if HAS_GPU else 2e-6


@runs_triton
@pytest.mark.parametrize("spec_name", ["gqa", "window", "softcap", "sinks and window", "value_dim", "odd dims"])
@pytest.mark.parametrize("block_size", [None, 16])
def test_parts_make_the_whole(spec_name: str, block_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "_LEAST_KEYS", 16)
    spec = SPECS[spec_name]
    # The short sequence has parts without any keys.
    query, view, batch, sinks = filled(spec, ((299, 1), (3, 1)), device=DEVICE)
    expected = attend(query, view, batch, spec, sinks)
    if block_size is None:
        result = TritonKernel(DEVICE)(query, view, batch, spec, sinks)
    else:
        blocks = in_blocks(view, batch, spec, block_size)
        result = TritonPagedKernel(DEVICE)(query, blocks, batch, spec, sinks)
    torch.testing.assert_close(result.double().cpu(), expected, atol=TOLERANCE, rtol=0)


@runs_triton
def test_more_query_heads_than_a_program_takes() -> None:
    spec = AttentionSpec(70, 1, 16, 16, 0.25)
    query, view, batch, _ = filled(spec, BATCHES["decodes"], device=DEVICE)
    expected = attend(query, view, batch, spec)
    result = TritonKernel(DEVICE)(query, view, batch, spec, None)
    torch.testing.assert_close(result.double().cpu(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("spec_name", ["wide", "wide, window", "wide, softcap"])
@pytest.mark.parametrize("block_size", [None, 3])
def test_prompts_go_through_torchs_flash_attention_where_it_can(spec_name: str, block_size: int | None) -> None:
    spec, operator = SPECS[spec_name], FakeTorchFlash(takes_tables=False)
    query, view, batch, _ = filled(spec, BATCHES["long chunks"], torch.bfloat16)
    expected = attend(query, view, batch, spec)
    if block_size is None:
        result = TritonKernel("cpu", TorchFlashKernel(operator, "cpu"))(query, view, batch, spec, None)
    else:
        blocks = in_blocks(view, batch, spec, block_size)
        kernel = TritonPagedKernel("cpu", TorchFlashGatheredKernel(operator, "cpu"))
        result = kernel(query, blocks, batch, spec, None)
    torch.testing.assert_close(result.double(), expected, atol=2e-2, rtol=0)
    assert operator.calls == (0 if spec.softcap else 1)


def test_parts_fill_the_gpu() -> None:
    assert splits(192 * 1024, num_programs=8, num_processors=132) == 64
    assert splits(192 * 1024, num_programs=8 * 64, num_processors=132) == 2
    assert splits(192 * 1024, num_programs=8 * 256, num_processors=132) == 1
    assert splits(1 << 20, num_programs=1, num_processors=132) == MOST_SPLITS


def test_parts_are_not_too_small() -> None:
    assert splits(1, num_programs=1, num_processors=132) == 1
    assert splits(1024, num_programs=1, num_processors=132) == 4
    assert splits(1023, num_programs=1, num_processors=132) == 2


def test_says_what_it_cannot() -> None:
    spec = SPECS["gqa"]
    kernel = TritonKernel("cpu")

    def reason(spec: AttentionSpec, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
        view = empty_view(LayerView, spec, dtype, device)
        assert isinstance(view, LayerView)
        return kernel.unsupported(spec, view) or ""

    assert "meta" in reason(spec, device="meta")
    if HAS_TRITON:
        assert "float64" in reason(spec, torch.float64)
        assert "512" in reason(replace(spec, key_dim=512))
        assert not reason(spec)
    else:
        assert "not installed" in reason(spec)


class Launcher:
    """Triton's on a GPU, as strict as the driver behind it may be: every tensor has to begin in mapped memory."""

    def __init__(self, view: CacheView) -> None:
        self._reserved = {view.keys.untyped_storage().data_ptr(), view.values.untyped_storage().data_ptr()}
        self.keywords: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.keywords |= keywords
            for at, argument in enumerate(arguments):
                if isinstance(argument, torch.Tensor) and argument.untyped_storage().data_ptr() in self._reserved:
                    raise ValueError(f"Pointer argument (at {at}) cannot be accessed from Triton (cpu tensor?)")

        return launch


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("block_size", [None, 16])
def test_a_cache_may_begin_where_no_memory_is(
    block_size: int | None, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS["gqa"]
    query, view, batch, _ = filled(spec, BATCHES["decodes"])
    stored: CacheView = view if block_size is None else in_blocks(view, batch, spec, block_size)
    shifted = stored.keys.new_empty(stored.keys.numel() + offset)[offset:].view(stored.keys.shape)
    stored = replace(stored, keys=shifted)
    launcher = Launcher(stored)
    kernels = SimpleNamespace(partial_attention=launcher, join_parts=launcher)
    monkeypatch.setattr(triton_decode, "_kernels", lambda: kernels)
    for half in sequences(batch, spec.window):
        triton_decode.decode(query, stored, half, spec, None)
    # What Triton finds out by itself of tensors: whether 16 bytes can be read at a time.
    addresses = stored.keys.data_ptr(), stored.values.data_ptr()
    assert launcher.keywords["is_aligned"] == all(address % 16 == 0 for address in addresses)


@needs_triton
def test_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.attention.compile_triton"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = [line.split() for line in result.stdout.splitlines()]
    shared = [int(words[-2]) for words in found]
    assert len(shared) == 6
    assert max(shared) <= 99 * 1024  # of a block on GPUs that are not a data centre's
    # Keys and values are copied 16 bytes at a time, behind the products.
    assert all(int(words[-1]) > 0 for words in found if words[0] == "partial_attention")
