"""The Triton kernel: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.attention.cases import BATCHES, SPECS, filled, in_blocks
from tests.attention.reference import attend
from tests.attention.subjects import HAS_GPU, HAS_TRITON, empty_view
from vattention.attention import triton_decode
from vattention.attention.triton_decode import MOST_SPLITS, TritonKernel, TritonPagedKernel, splits
from vattention.core import AttentionSpec
from vattention.kv.manager import LayerView

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")

DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCE = 2e-5 if HAS_GPU else 2e-6


@needs_triton
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


@needs_triton
def test_more_query_heads_than_a_program_takes() -> None:
    spec = AttentionSpec(70, 1, 16, 16, 0.25)
    query, view, batch, _ = filled(spec, BATCHES["decodes"], device=DEVICE)
    expected = attend(query, view, batch, spec)
    result = TritonKernel(DEVICE)(query, view, batch, spec, None)
    torch.testing.assert_close(result.double().cpu(), expected, atol=TOLERANCE, rtol=0)


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


@needs_triton
def test_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.attention.compile_triton"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    shared = [int(line.split()[-1]) for line in result.stdout.splitlines()]
    assert len(shared) == 6
    assert max(shared) <= 99 * 1024  # of a block on GPUs that are not a data centre's
