"""Norms, rotary embeddings and gates of every device: those in C, and those in Triton on a GPU or interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.model.test_fused_attention import CONFIGS, build
from tests.triton_here import HAS_GPU, HAS_TRITON
from vattention.model import optimize as optimizing
from vattention.model import row_kernels as choosing
from vattention.model.difference import TOLERANCE, row_difference
from vattention.model.optimize import optimize
from vattention.model.row_kernels import RowKernels, row_kernels
from vattention.native import kernels

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")

DEVICE = "cuda" if HAS_GPU else "cpu"


def native() -> RowKernels:
    compiled = kernels()
    if compiled is None:
        pytest.skip("no compiled kernels here")
    return compiled.rowwise


def in_triton() -> RowKernels:
    if not HAS_TRITON:
        pytest.skip("the package triton is not installed")
    from vattention.model.triton_rows import TritonRows

    return TritonRows(DEVICE)


@pytest.fixture(params=[native, in_triton], ids=["native", "triton"])
def rows(request: pytest.FixtureRequest) -> RowKernels:
    found: RowKernels = request.param()
    return found


def drawn(rows: RowKernels, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(rows.device_type, dtype)


def every_dtype(rows: RowKernels) -> list[torch.dtype]:
    return sorted(rows.dtypes, key=str)


def normed(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x.double(), (len(scale),), scale.double(), epsilon)


@pytest.mark.parametrize("width", [1, 15, 16, 640, 1000, 4096])
def test_norms(rows: RowKernels, width: int) -> None:
    for dtype in every_dtype(rows):
        # A row so small that epsilon counts, and one of nothing else.
        x = drawn(rows, dtype, 4, width) * torch.tensor([[1.0], [1e-3], [0.0], [50.0]]).to(rows.device_type, dtype)
        scale = drawn(rows, torch.float32, width)
        y = torch.full_like(x, torch.nan)
        rows.rms_norm(x, scale, 1e-5, y)
        assert row_difference(y, normed(x, scale, 1e-5)) <= TOLERANCE[dtype]
        in_place = x.clone()
        rows.rms_norm(in_place, scale, 1e-5, in_place)
        assert torch.equal(in_place, y)
        rows.rms_norm(x[:0], scale, 1e-5, y[:0])


@pytest.mark.parametrize("width", [1, 72, 1024, 1500])
@pytest.mark.parametrize(("linear", "cubic"), [(1.0, 0.0), (1.6, 0.07)])
def test_gates(rows: RowKernels, width: int, linear: float, cubic: float) -> None:
    for dtype in every_dtype(rows):
        gate_up = drawn(rows, dtype, 3, 2 * width) * 20
        y = torch.full_like(gate_up[:, :width], torch.nan).contiguous()
        rows.gate(gate_up, linear, cubic, y)
        gates, ups = gate_up.double().chunk(2, 1)
        expected = gates * torch.sigmoid(gates * (linear + cubic * gates * gates)) * ups
        torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=1e-6)
        rows.gate(gate_up[:0], linear, cubic, y[:0])


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cosines + torch.cat((-high, low), -1) * sines


@pytest.mark.parametrize("norms", ["none", "queries", "keys", "both"])
@pytest.mark.parametrize(("num_queries", "num_keys", "head_dim"), [(32, 8, 128), (5, 1, 20), (6, 3, 96), (1, 1, 2)])
def test_rotations(rows: RowKernels, norms: str, num_queries: int, num_keys: int, head_dim: int) -> None:
    num_tokens, num_heads = 3, num_queries + num_keys
    for dtype in every_dtype(rows):
        x = drawn(rows, dtype, num_tokens, (num_heads + num_keys) * head_dim)
        cosines, sines = drawn(rows, dtype, 2, num_tokens, head_dim)
        queries = (drawn(rows, torch.float32, head_dim) + 2, 1e-2) if norms in ("queries", "both") else None
        keys = (drawn(rows, torch.float32, head_dim) - 2, 3e-1) if norms in ("keys", "both") else None
        heads = x.double().view(num_tokens, -1, head_dim)
        wanted = []
        parts = torch.split(heads, [num_queries, num_keys, num_keys], 1)
        for part, norm in zip(parts, (queries, keys, None), strict=True):
            wanted.append(part if norm is None else normed(part, *norm))
        wanted[:2] = (rotated(part, cosines.double()[:, None], sines.double()[:, None]) for part in wanted[:2])
        rotation = rows.rotation((num_queries, num_keys), (queries, keys), head_dim, x.shape[1], dtype)
        rows.rotate(rotation, x[:0], cosines[:0], sines[:0])
        rows.rotate(rotation, x, cosines, sines)
        found = x.view(num_tokens, -1, head_dim)
        assert row_difference(found.flatten(0, 1), torch.cat(wanted, 1).flatten(0, 1)) <= 2 * TOLERANCE[dtype]
        assert torch.equal(found[:, num_heads:], heads[:, num_heads:].to(dtype))  # values stay


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_compute_the_same(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizing, "row_kernels", lambda _: in_triton())
    before, after = (build(name, dtype).to(DEVICE) for _ in range(2))
    report = optimize(after)
    assert report.refused == ()
    assert report.replaced["attention"] == report.replaced["gated mlp"] == 1
    assert report.replaced["rms norm"] >= 3
    token_ids = torch.arange(12, device=DEVICE)[None]
    exact = build(name, dtype).to(DEVICE, torch.float32)(token_ids).logits[0]
    found, plain = (float((model(token_ids).logits[0] - exact).square().mean()) for model in (after, before))
    # Triton's interpreter cuts numbers off where they become bfloat16.
    leeway = 2.0 if dtype == torch.bfloat16 and not HAS_GPU else 1.2
    assert found <= leeway * plain + 1e-10


@pytest.mark.skipif(not HAS_GPU, reason="there is no GPU here")
def test_a_gpu_has_kernels_and_keeps_torchs_products() -> None:
    model = build("qwen3", torch.bfloat16).to("cuda")
    report = optimize(model)
    assert report.replaced == {"attention": 1, "gated mlp": 1, "rms norm": 5}
    assert report.kept == 2


def test_a_device_without_kernels_has_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert row_kernels(torch.device("meta")) is None
    row_kernels.cache_clear()
    monkeypatch.setattr(choosing, "find_spec", lambda _: None)
    assert row_kernels(torch.device("cuda", 0)) is None
    assert "triton is not installed" in caplog.text
    row_kernels.cache_clear()


@needs_triton
@pytest.mark.skipif(HAS_GPU, reason="kernels work here")
def test_kernels_that_do_not_work_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    row_kernels.cache_clear()
    assert row_kernels(torch.device("cuda", 0)) is None
    assert "cannot be used" in caplog.text
    row_kernels.cache_clear()


@needs_triton
def test_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.model.compile_triton_rows"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = [line.split() for line in result.stdout.splitlines()]
    assert len(found) == 6
    assert all(int(words[-1]) > 0 for words in found)  # 16 bytes are read at a time
