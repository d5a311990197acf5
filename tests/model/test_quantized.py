"""Products with quantized weights against float64 of what the weights stand for; whole models; embeddings."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.attention.dense import DenseManager
from tests.model.architectures import ARCHITECTURES, MAX_LEN
from tests.model.greedy import generate, greedy
from vattention import native
from vattention.model import quantized as subject
from vattention.model.fused_layer import fuse_layers
from vattention.model.gumbel import likeliest, noise_for
from vattention.model.linear import PackedLinear
from vattention.model.optimize import optimize
from vattention.model.probe import probe
from vattention.model.quantize import pack, unpack
from vattention.model.quantized import (
    QUANTIZATIONS,
    HalvedInt8Linear,
    Int4Linear,
    Int8Linear,
    QuantizedEmbedding,
    QuantizedMethod,
    UnpackingInt4,
    UnpackingInt8,
)
from vattention.model.runner import ModelRunner

NATIVE: list[type[Int8Linear] | type[HalvedInt8Linear] | type[Int4Linear]] = [
    Int8Linear,
    HalvedInt8Linear,
    Int4Linear,
]
METHODS = [*NATIVE, UnpackingInt8, UnpackingInt4]
SHAPES = ((1, 1), (32, 32), (33, 17), (100, 77), (65, 318), (65, 320), (640, 1030), (320, 1024))
"""[out, in]: whole panels and groups, and all kinds of rests."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    pytest.param(method, dtype, id=f"{method.name}-{str(dtype).removeprefix('torch.')}")
    for method in METHODS
    for dtype in DTYPES
    if method.available(dtype)
]
EPSILON = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason="no compiled kernels here")


def largest_error(method: type[QuantizedMethod], num_out: int, num_in: int, rows: int, dtype: torch.dtype) -> float:
    """Of random products, as a share of what rounding the weight and the result may make."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(num_out, num_in, generator=generator).to(dtype)
    # Groups of different size: a scale in the wrong place shows.
    weight *= torch.logspace(-1, 1, num_in).to(dtype) * torch.logspace(1, -1, num_out)[:, None].to(dtype)
    bias = torch.randn(num_out, generator=generator).to(dtype)
    x = torch.randn(rows, num_in, generator=generator).to(dtype)
    stands_for = unpack(method.kind, pack(method.kind, weight), num_out, num_in, torch.float32).double()
    worst = 0.0
    for given in (None, bias):
        packed = method.pack(weight, given)
        assert torch.equal(packed.weight(), stands_for.to(dtype))
        y = packed(x)
        exact = x.double() @ stands_for.T + (0.0 if given is None else given.double())
        # Rounding errors of many numbers add up as a random walk does.
        walk = (x.double().square() @ stands_for.square().T).sqrt() + exact.abs()
        assert y.dtype == dtype
        assert y.shape == exact.shape
        if rows:
            worst = max(worst, float(((y.double() - exact).abs() / walk).max()) / EPSILON[dtype])
    return worst


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 16, 17, 100])
def test_agrees_with_float64(method: type[QuantizedMethod], dtype: torch.dtype, rows: int) -> None:
    for num_out, num_in in SHAPES:
        assert largest_error(method, num_out, num_in, rows, dtype) <= 1.5, (num_out, num_in)


@needs_kernels
@pytest.mark.parametrize("method", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("rows", "num_in"), [(97, 6912), (421, 3072)])
def test_blocks_of_rows(method: type[QuantizedMethod], dtype: torch.dtype, rows: int, num_in: int) -> None:
    assert largest_error(method, 33, num_in, rows, dtype) <= 1.5


@needs_kernels
@pytest.mark.parametrize("method", NATIVE)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(method: type[QuantizedMethod], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 30):
            assert largest_error(method, 999, 640, rows, torch.bfloat16) <= 1.5
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("method", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_the_largest_are_those_of_the_product(method: type[Int8Linear], dtype: torch.dtype, rows: int) -> None:
    weight, x = torch.randn(5003, 96).to(dtype), torch.randn(rows, 96).to(dtype)
    packed = method.pack(weight, None)
    logits = torch.empty(rows, 5003)
    packed.write(x, logits)
    columns, values = packed.largest(x)
    assert np.array_equal(columns, logits.argmax(-1).numpy())
    assert np.array_equal(values, logits.amax(-1).numpy())
    noise = noise_for([(7, i, (2.0, 0.0, 0.1)[i % 3]) for i in range(rows)])
    sampled, noisy = packed.largest(x, noise), likeliest(logits, noise)
    assert np.array_equal(sampled[0], noisy[0])
    assert np.array_equal(sampled[1], noisy[1])


@needs_kernels
@pytest.mark.parametrize("method", NATIVE)
def test_not_a_number_stays_in_its_row(method: type[QuantizedMethod]) -> None:
    for rows in (3, 20):
        x = torch.ones(rows, 64).bfloat16()
        x[1, 7] = torch.nan
        y = method.pack(torch.ones(50, 64).bfloat16(), None)(x)
        assert bool((y[0] == 64).all())
        assert bool(y[1].isnan().all())


def between_guards(tensor: Tensor) -> Tensor:
    """A copy that ends where readable memory does."""
    nbytes = tensor.nbytes
    end = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = torch.frombuffer(mmap.mmap(-1, end + mmap.PAGESIZE), dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(whole.data_ptr() + end), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return whole[end - nbytes : end].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def multiply_between_guards() -> None:
    """Inputs that end at the edge of memory, whether they are whole groups or not."""
    for dtype in DTYPES[:2]:
        for method in NATIVE:
            for num_in in (32, 31, 34, 320):
                packed = method.pack(torch.randn(40, num_in).to(dtype), None)
                for rows in (1, 4, 5, 33):
                    x = between_guards(torch.randn(rows, num_in).to(dtype))
                    assert packed(x).isfinite().all()


@needs_kernels
def test_reads_nothing_outside() -> None:
    command = [sys.executable, "-c", f"from {__name__} import *; multiply_between_guards()"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the compiled kernels are looked for: an empty folder."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.kernels.cache_clear()
    yield tmp_path
    native.kernels.cache_clear()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(("lanes", "dot"), [(4, 0), (8, 0), (16, 0), (16, 1)])
def test_lesser_processors_give_the_same(
    folder: Path, lanes: int, dot: int, kernels_of_lanes: Callable[..., Path]
) -> None:
    shutil.copy(kernels_of_lanes(lanes, dot), folder / f"_kernels{EXTENSION_SUFFIXES[0]}")
    for method in NATIVE:
        for dtype in DTYPES[:2]:
            for rows in (1, 4, 7, 30):
                test_agrees_with_float64(method, dtype, rows)
            test_blocks_of_rows(method, dtype, 421, 3072)


def test_without_the_library_weights_are_as_small(folder: Path) -> None:
    assert native.kernels() is None
    for name, quantization in QUANTIZATIONS.items():
        method = quantization.method(torch.bfloat16)
        assert method.name == f"{name}, unpacked"
        assert method.pack(torch.ones(64, 64).bfloat16(), None).nbytes < 64 * 64 * 1.1


# Whole models.

DELICATE = ("q_proj", "k_proj", "v_proj", "qkv_proj")
PROMPTS = [[5, 9, 33, 2, 71, 8, 9], [7, 7, 40], [100, 3, 64, 21, 90, 11, 12, 13, 14, 15, 16, 17]]


def stand_ins(model: PreTrainedModel, quantization: str) -> PreTrainedModel:
    """A copy of a model whose linear layers have the weights that quantized ones stand for."""
    other = deepcopy(model)
    own = QUANTIZATIONS[quantization]
    for name, module in other.named_modules():
        if type(module) is nn.Linear:
            delicate = module is other.get_output_embeddings() or name.endswith(DELICATE)
            method = own.method(module.weight.dtype, delicate=delicate)
            module.weight.data = method.pack(module.weight, None).weight()
    return other


def computed(model: PreTrainedModel, quantization: str, num_tokens: int) -> list[list[int]]:
    optimize(model, quantization)
    attention = probe(model)
    fuse_layers(model, attention)
    cache = DenseManager(attention.cache_specs, num_slots=4, max_len=MAX_LEN)
    runner = ModelRunner(model, attention, cache)
    try:
        return greedy(runner, cache, PROMPTS, num_tokens)
    finally:
        runner.close()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "mixtral", "phi3"])
def test_tokens_are_those_of_what_the_weights_stand_for(name: str, quantization: str) -> None:
    model = ARCHITECTURES[name]()
    expected = generate(stand_ins(model, quantization), PROMPTS, 12)
    assert computed(model, quantization, 12) == expected
    assert not any(type(module) is nn.Linear for module in model.modules())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_layers_are_fused_as_ever(name: str, quantization: str) -> None:
    if native.kernels() is None:
        pytest.skip("no compiled kernels here")
    model = ARCHITECTURES[name]()
    report = optimize(model, quantization)
    attention = probe(model)
    assert report.refused == ()
    assert fuse_layers(model, attention) == len(attention.layers)
    assert cast(Any, model).lm_head.method.name == "int8"
    assert cast(Any, model).model.layers[0].self_attn.o_proj.method.name == quantization


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_without_the_library_models_compute_the_same(quantization: str, folder: Path) -> None:
    model = ARCHITECTURES["llama"]()
    expected = generate(stand_ins(model, quantization), PROMPTS, 8)
    assert computed(model, quantization, 8) == expected


def tied(name: str) -> PreTrainedModel:
    model = ARCHITECTURES[name]()
    model.set_output_embeddings(nn.Linear(32, 128, bias=False))
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_tied_embedding_reads_the_output_layer(name: str) -> None:
    model = tied(name)
    expected = stand_ins(model, "int8")
    table = expected.get_input_embeddings()
    assert table.weight is expected.get_output_embeddings().weight
    ids = torch.tensor([[3, 90, 3], [127, 0, 64]])
    report = optimize(model, "int4")
    assert report.replaced["embedding"] == 1
    own = model.get_input_embeddings()
    assert isinstance(own, QuantizedEmbedding)
    assert own.num_embeddings == table.num_embeddings
    assert torch.equal(own(ids), table(ids))
    assert torch.equal(own(ids[:1]), table(ids[:1]))
    assert torch.equal(own.weight, table.weight)
    assert not any(parameter.shape == table.weight.shape for parameter in model.parameters())


def test_an_embedding_of_its_own_stays() -> None:
    model = ARCHITECTURES["llama"]()
    embedding = model.get_input_embeddings()
    assert "embedding" not in optimize(model, "int8").replaced
    assert model.get_input_embeddings() is embedding


def test_memory_shrinks() -> None:
    sizes = {}
    for quantization in (None, "int8", "int4"):
        model = tied("llama")
        whole = sum(parameter.nbytes for parameter in model.parameters())
        sizes[quantization] = optimize(model, quantization).nbytes
        assert sizes[quantization] > 0
    assert sizes[None] >= whole
    assert sizes["int8"] < 0.3 * whole
    assert sizes["int4"] < 0.27 * whole


def test_a_weight_that_is_not_finite_stays(caplog: pytest.LogCaptureFixture) -> None:
    kept = nn.Linear(64, 64)
    with torch.no_grad():
        kept.weight[3, 5] = torch.inf
    model = nn.Sequential(nn.Linear(64, 64), kept)
    report = optimize(model, "int8")
    assert report.refused == ("1",)
    assert model[1] is kept
    assert "1 stays as it is" in caplog.text


@needs_kernels
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Int8Linear):
        def write(self, x: Tensor, y: Tensor) -> None:
            super().write(x, y)
            y[-1, ::32] *= 1.05

    wrong = subject.Quantization((Wrong,), (Wrong,), (Wrong,))
    monkeypatch.setitem(QUANTIZATIONS, "int8", wrong)
    model = ARCHITECTURES["llama"]()
    report = optimize(model, "int8")
    # Merged ones are tried first, and then each by itself.
    assert len(report.refused) == 3 * (1 + 7) + 1
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
