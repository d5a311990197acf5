"""Every way to compute a linear layer, forced, against float64."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vattention import native
from vattention.model import linear as subject
from vattention.model.gumbel import noise_for
from vattention.model.linear import (
    METHODS,
    LinearMethod,
    NativeLinear,
    PackedLinear,
    TorchLinear,
    WideningLinear,
    fastest_method,
)
from vattention.native import Noise
from vattention.native.huge import huge_empty

LIBRARY = f"_kernels{EXTENSION_SUFFIXES[0]}"
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (32, 16), (33, 17), (100, 77), (65, 300), (65, 320), (640, 1030), (320, 1024))
"""[out, in]: whole panels, strips and tiles of the compiled kernel, and all kinds of rests."""

CASES = [
    pytest.param(method, dtype, id=f"{method.name}-{str(dtype).removeprefix('torch.')}")
    for method in METHODS
    for dtype in DTYPES
    if method.available(dtype)
]


def tolerance(x: Tensor, weight: Tensor) -> float:
    """One unit in the last place of the largest result, and float32's rounding on the way."""
    scale = float((x.double().abs() @ weight.double().abs().T).max())
    largest = float((x.double() @ weight.double().T).abs().max())
    return (2**-7 * largest if x.dtype == torch.bfloat16 else 0.0) + 1e-6 * scale


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 12, 13, 37, 200])
def test_agrees_with_float64(method: type[LinearMethod], dtype: torch.dtype, rows: int) -> None:
    for num_out, num_in in SHAPES:
        weight, bias = torch.randn(num_out, num_in).to(dtype), torch.randn(num_out).to(dtype)
        x = torch.randn(rows, num_in).to(dtype)
        for given in (None, bias):
            y = method.pack(weight, given)(x)
            exact = x.double() @ weight.double().T + (0 if given is None else given.double())
            assert y.dtype == dtype
            assert y.shape == exact.shape
            if rows:
                bound = tolerance(x, weight) + (2**-7 * 5 if dtype == torch.bfloat16 else 0)
                assert float((y.double() - exact).abs().max()) <= bound, (num_out, num_in, given is None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_in"), [(97, 6912), (421, 3072), (1009, 2560), (3841, 1152)])
def test_blocks_of_rows_that_do_not_come_out_even(rows: int, num_in: int, dtype: torch.dtype) -> None:
    if not NativeLinear.available(dtype):
        pytest.skip("no compiled kernels here")
    weight, x = torch.randn(33, num_in).to(dtype), torch.randn(rows, num_in).to(dtype)
    error = (NativeLinear.pack(weight, None)(x).double() - x.double() @ weight.double().T).abs().max()
    assert float(error) <= tolerance(x, weight)


@pytest.mark.parametrize("num_in", [640, 2080, 5632])
def test_fewer_rows_never_take_more_workspace(num_in: int) -> None:
    """A layer has one workspace for blocks of rows of which the last may be smaller."""
    if native.kernels() is None:
        pytest.skip("no compiled kernels here")
    nbytes = ctypes.CDLL(str(native.FOLDER / LIBRARY)).vattention_tall_nbytes
    nbytes.restype, nbytes.argtypes = (
        ctypes.c_int64,
        (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int32),
    )
    weight = native.LinearWeight(None, None, 96, num_in, 1, 0)
    sizes = [nbytes(ctypes.addressof(weight), rows, gated, 1) for gated in (0, 1) for rows in range(1, 600)]
    assert sizes[:599] == sorted(sizes[:599])
    assert sizes[599:] == sorted(sizes[599:])


@pytest.mark.parametrize(("activation", "linear", "cubic"), [("silu", 1.0, 0.0), ("gelu", 1.5957691, 0.0713548)])
def test_a_gate_is_computed_with_its_product_over_the_whole_range(
    activation: str, linear: float, cubic: float
) -> None:
    if native.kernels() is None:
        pytest.skip("no compiled kernels here")
    library = ctypes.CDLL(str(native.FOLDER / LIBRARY))
    gates = torch.tensor([0.0, 1e-30, 0.3, 2.0, 9.0, 120.0, 3e19, 1e30])
    weight = torch.zeros(64, 32)
    weight[:16, 0] = torch.cat((gates, -gates))
    weight[16:32, 0] = torch.linspace(-6, 6, 16)
    weight[32:, 1] = 1.0
    method = NativeLinear.pack(weight.bfloat16(), None)
    address = ctypes.addressof(method.native)
    if not library.vattention_can_tall(ctypes.c_void_p(address)):
        pytest.skip("needs a processor with matrix tiles")
    x = torch.zeros(200, 32).bfloat16()
    x[:, 0] = 1.0
    x[:, 1] = torch.linspace(-1, 1, 200)
    library.vattention_tall_nbytes.restype = ctypes.c_int64
    nbytes = library.vattention_tall_nbytes(ctypes.c_void_p(address), ctypes.c_int64(200), 1, 1)
    workspace, y = huge_empty(nbytes, torch.uint8), torch.empty(200, 32).bfloat16()
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y, workspace)]
    gating = (ctypes.c_float * 2)(linear, cubic)
    library.vattention_tall(
        ctypes.c_void_p(address),
        places[0],
        ctypes.c_int64(32),
        ctypes.c_int64(200),
        places[1],
        1,
        gating,
        places[2],
        1,
        None,
    )
    gate = weight[:32, 0].bfloat16().double()
    own = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    torch.testing.assert_close(y.double(), own * x[:, 1:2].double(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_gives_the_weight_back(method: type[LinearMethod], dtype: torch.dtype) -> None:
    for num_out, num_in in SHAPES:
        weight = torch.randn(num_out, num_in).to(dtype)
        assert torch.equal(method.pack(weight, None).weight(), weight)


@pytest.mark.parametrize("method", [method for method in METHODS if method.available(torch.bfloat16)])
def test_takes_a_weight_that_begins_anywhere(method: type[LinearMethod]) -> None:
    weight = torch.randn(1 + 70 * 60).bfloat16()[1:].view(70, 60)
    assert torch.equal(method.pack(weight, None).weight(), weight)


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_takes_any_strides(method: type[LinearMethod], dtype: torch.dtype) -> None:
    weight = torch.randn(70, 60).T[:, ::2].to(dtype)
    packed = method.pack(weight, None)
    wide = torch.randn(9, 70).to(dtype)
    for x in (wide[:, ::2], wide[::2, 3:38], torch.randn(35, 9).to(dtype).T, wide[:1, :35].expand(4, 35)):
        error = (packed(x).double() - x.double() @ weight.double().T).abs().max()
        assert float(error) <= tolerance(x, weight)


@pytest.mark.parametrize(("method", "dtype"), CASES)
@pytest.mark.parametrize("threads", [1, 2, 5, 20])
def test_any_number_of_threads_gives_the_same(method: type[LinearMethod], dtype: torch.dtype, threads: int) -> None:
    weight, x = torch.randn(333, 400).to(dtype), torch.randn(101, 400).to(dtype)
    packed = method.pack(weight, None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        error = (packed(x).double() - x.double() @ weight.double().T).abs().max()
    finally:
        torch.set_num_threads(before)
    assert float(error) <= tolerance(x, weight)


@pytest.mark.skipif(not NativeLinear.available(torch.bfloat16), reason="no compiled kernels here")
class TestNative:
    def test_rounds_as_torch_does(self) -> None:
        """Products with the identity are the inputs: every bfloat16 pattern goes in and comes out.

        But for subnormal ones, which processors' bfloat16 instructions take for zero.
        """
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        normal = patterns.isfinite() & (patterns.abs() >= torch.finfo(torch.bfloat16).tiny)
        finite = patterns[normal].reshape(-1, 2)
        identity = NativeLinear.pack(torch.eye(2).bfloat16(), None)
        assert torch.equal(identity(finite), finite)
        wide = torch.randn(1000, 2).bfloat16()
        bias = torch.randn(2).bfloat16()
        expected = (wide.float() + bias.float()).bfloat16()
        assert torch.equal(NativeLinear.pack(torch.eye(2).bfloat16(), bias)(wide), expected)

    def test_nan_and_infinity_stay_in_their_row(self) -> None:
        for dtype in DTYPES:
            x = torch.ones(3, 40).to(dtype)
            x[1, 7] = torch.nan
            x[2, 3] = torch.inf
            y = NativeLinear.pack(torch.ones(50, 40).to(dtype), None)(x)
            assert bool((y[0] == 40).all())
            assert bool(y[1].isnan().all())
            assert bool(y[2].isposinf().all())

    def test_bfloat16_is_as_accurate_as_torch(self) -> None:
        weight, x = torch.randn(500, 2048).bfloat16(), torch.randn(20, 2048).bfloat16()
        exact = x.double() @ weight.double().T
        errors = [float((method.pack(weight, None)(x).double() - exact).abs().mean()) for method in METHODS]
        assert errors[METHODS.index(NativeLinear)] <= 1.01 * errors[0]

    def test_refuses_another_type(self) -> None:
        packed = NativeLinear.pack(torch.ones(4, 4).bfloat16(), None)
        with pytest.raises(RuntimeError, match="float32"):
            packed(torch.ones(1, 4))


def noises(num_rows: int) -> Iterator[Noise | None]:
    """None, and noise at one temperature or at another one for each row."""
    yield None
    for temperatures in ((0.02,), (1.0,), (30.0,), (1e9,), (0.0, 1.0, 1e-3, 1e5)):
        yield noise_for([(3, i, temperatures[i % len(temperatures)]) for i in range(num_rows)])


def same_largest(weight: Tensor, x: Tensor) -> None:
    """The screened result is that of computing everything, to the bit."""
    plain, screened = NativeLinear.pack(weight, None), NativeLinear.pack(weight, None)
    assert screened.screen()
    for noise in noises(len(x)):
        assert screened._screen is not None
        screened._screen._num_rests = 0
        for own, expected in zip(screened.largest(x, noise), plain.largest(x, noise), strict=True):
            np.testing.assert_array_equal(own, expected)


def some_weights() -> Iterator[tuple[Tensor, Tensor]]:
    """Weights and inputs that are hard to screen, for some reason each."""
    for num_out, num_in in ((1, 1), (31, 64), (33, 65), (5000, 100), (3000, 640)):
        yield torch.randn(num_out, num_in), torch.randn(5, num_in)
    outliers = torch.randn(4000, 128)
    outliers[:, 7] *= 100.0
    yield outliers, torch.randn(21, 128) * torch.logspace(-3, 3, 128)
    close = torch.randn(1, 96).expand(3000, -1) + torch.randn(3000, 96) * 1e-3
    yield close, torch.randn(40, 96)
    tiny = torch.zeros(32 * 40, 64)
    tiny[:, 3] = torch.logspace(-45, -10, len(tiny))
    tiny[17] = torch.randn(64)
    yield tiny, torch.cat([tiny[17:18], -tiny[17:18], torch.randn(2, 64) * 1e-20, torch.randn(1, 64) * 1e30])
    few = torch.zeros(2000, 64)
    few[[5, 1700, 1999], 3] = 1.0
    yield few, torch.cat([torch.eye(64)[:9], -torch.eye(64)[:9], torch.zeros(1, 64)])


@pytest.mark.skipif(
    (library := native.kernels()) is None or not library.can_screen, reason="needs a processor with VNNI"
)
class TestScreen:
    def test_the_largest_are_the_same(self) -> None:
        for weight, x in some_weights():
            same_largest(weight.bfloat16(), x.bfloat16())

    def test_nan_and_infinity_are_seen(self) -> None:
        weight, x = torch.randn(3000, 64).bfloat16(), torch.randn(6, 64).bfloat16()
        x[2, 5], x[4, 1] = torch.nan, torch.inf
        same_largest(weight, x)
        weight[2000, 3] = torch.nan
        assert not NativeLinear.pack(weight, None).screen()
        weight[2000, 3] = torch.inf
        assert not NativeLinear.pack(weight, None).screen()

    def test_it_computes_few_panels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An input that is one of the weight's rows: memory that no other row needs may hold anything."""
        weight = torch.randn(32 * 100, 256).bfloat16()
        screened = NativeLinear.pack(weight, None)
        assert screened.screen()
        screened._panels.view(100, -1)[:50] = torch.nan
        assert screened.largest(weight[3000:3001])[0].tolist() == [3000]

    @pytest.mark.parametrize("temperature", [1.0, 1e6])
    def test_it_computes_few_panels_of_a_sample(self, temperature: float) -> None:
        """Where noise decides, and where the product does: only panels near the winner's may be looked at."""
        weight, x = torch.randn(32 * 100, 256).bfloat16(), torch.zeros(2, 256).bfloat16()
        x[:] = weight[3000] if temperature == 1.0 else weight[3000] * 1e-3
        screened = NativeLinear.pack(weight, None)
        assert screened.screen()
        noise = noise_for([(1, 2, temperature), (1, 3, temperature)])
        columns, _ = screened.largest(x, noise)
        panels = screened._panels.view(100, -1)
        for panel in set(range(100)) - {column // 32 for column in columns.tolist()}:
            panels[panel] = torch.nan
        assert screened.largest(x, noise)[0].tolist() == columns.tolist()

    def test_only_plain_bfloat16(self) -> None:
        assert not NativeLinear.pack(torch.randn(64, 64), None).screen()
        assert not NativeLinear.pack(torch.randn(64, 64).bfloat16(), torch.zeros(64).bfloat16()).screen()


def test_widening_splits_wide_weights() -> None:
    class SmallBlocks(WideningLinear):
        block_nbytes = 4 * 50 * 7

    weight, x = torch.randn(100, 50).bfloat16(), torch.randn(40, 50).bfloat16()
    exact = x.double() @ weight.double().T
    assert float((SmallBlocks.pack(weight, None)(x).double() - exact).abs().max()) <= tolerance(x, weight)


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (2, 0, 24)])
def test_module_takes_inputs_of_any_dimensions(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(24, 40)
    for method in METHODS:
        if method.available(torch.float32):
            packed = PackedLinear.of(linear, method)
            with torch.no_grad():
                torch.testing.assert_close(packed(torch.ones(shape)), linear(torch.ones(shape)))
            assert torch.equal(packed.weight, linear.weight)


def test_the_fastest_method_is_one_that_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    for dtype in (*DTYPES, torch.float16):
        assert fastest_method(300, 64, dtype).available(dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(subject, "METHODS", (TorchLinear,))
    assert fastest_method(300, 64, torch.bfloat16) is TorchLinear


@pytest.mark.skipif(not NativeLinear.has_tiles(64, torch.bfloat16), reason="needs a processor with matrix tiles")
def test_nothing_is_measured_where_there_are_matrix_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside busy processes the fastest method may look slow."""

    def never(*_: object) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(subject, "_mean_log_time", never)
    assert fastest_method(300, 64, torch.bfloat16) is NativeLinear
    for num_in, dtype in ((65, torch.bfloat16), (64, torch.float32)):
        with pytest.raises(AssertionError, match="measured"):
            fastest_method(300, num_in, dtype)


def test_a_slower_method_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(TorchLinear):
        def __call__(self, x: Tensor) -> Tensor:
            super().__call__(x)
            return super().__call__(x)

    monkeypatch.setattr(subject, "METHODS", (TorchLinear, Twice))
    assert fastest_method(2000, 300, torch.float32) is TorchLinear


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the compiled kernels are looked for: an empty folder."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.kernels.cache_clear()
    yield tmp_path
    native.kernels.cache_clear()


def test_other_methods_remain_without_the_library(folder: Path) -> None:
    assert native.kernels() is None
    assert not NativeLinear.available(torch.bfloat16)
    assert not NativeLinear.has_tiles(64, torch.bfloat16)
    assert fastest_method(64, 64, torch.bfloat16) is not NativeLinear
    with pytest.raises(RuntimeError, match="compiled kernels"):
        NativeLinear.pack(torch.ones(2, 2), None)


def test_a_broken_library_is_none(folder: Path) -> None:
    (folder / LIBRARY).write_bytes(b"no library")
    assert native.kernels() is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize(("lanes", "dot"), [(4, 0), (8, 0), (16, 0), (16, 1)])
def test_lesser_processors_give_the_same(
    folder: Path, lanes: int, dot: int, kernels_of_lanes: Callable[..., Path]
) -> None:
    shutil.copy(kernels_of_lanes(lanes, dot), folder / LIBRARY)
    for dtype in DTYPES:
        for rows in (1, 7, 30, 130):
            test_agrees_with_float64(NativeLinear, dtype, rows)
        test_blocks_of_rows_that_do_not_come_out_even(421, 3072, dtype)
        x = torch.randn(9, 100).to(dtype)
        kernels = native.kernels()
        assert kernels is not None
        assert kernels.can_screen <= (dot == 1)
        if kernels.can_screen and dtype == torch.bfloat16:
            for weight, some in some_weights():
                same_largest(weight.bfloat16(), some.bfloat16())
        normed, gated = torch.empty_like(x), torch.empty_like(x[:, :50])
        kernels.rms_norm(x, torch.ones(100), 1e-6, normed)
        kernels.gate(x, 1.0, 0.0, gated)
        rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(normed, F.rms_norm(x.double(), (100,), eps=1e-6).to(dtype), rtol=rtol, atol=1e-5)
        torch.testing.assert_close(gated, (F.silu(x[:, :50].double()) * x[:, 50:]).to(dtype), rtol=rtol, atol=1e-5)
