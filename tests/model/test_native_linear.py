"""Linear layers by the compiled kernels: rounding, blocks of rows, workspace, and processors that can do less."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.model.linears import DTYPES, check_products, same_largest, some_weights, tolerance
from vattention import native
from vattention.model.linear_methods import METHODS, fastest_method
from vattention.model.native_linear import NativeLinear
from vattention.native.huge import huge_empty

LIBRARY = f"_kernels{EXTENSION_SUFFIXES[0]}"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
            check_products(NativeLinear, dtype, rows)
        test_blocks_of_rows_that_do_not_come_out_even(421, 3072, dtype)
        x = torch.randn(9, 100).to(dtype)
        kernels = native.kernels()
        assert kernels is not None
        assert kernels.products.can_screen <= (dot == 1)
        if kernels.products.can_screen and dtype == torch.bfloat16:
            for weight, some in some_weights():
                same_largest(weight.bfloat16(), some.bfloat16())
        normed, gated = torch.empty_like(x), torch.empty_like(x[:, :50])
        kernels.rowwise.rms_norm(x, torch.ones(100), 1e-6, normed)
        kernels.rowwise.gate(x, 1.0, 0.0, gated)
        rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(normed, F.rms_norm(x.double(), (100,), eps=1e-6).to(dtype), rtol=rtol, atol=1e-5)
        torch.testing.assert_close(gated, (F.silu(x[:, :50].double()) * x[:, 50:]).to(dtype), rtol=rtol, atol=1e-5)
