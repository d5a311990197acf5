"""Linear layers that run fast on processors, whatever arithmetic those have for the weight's type.

torch multiplies bfloat16 well only where the processor has bfloat16 instructions (AVX512_BF16, AMX, recent Arm).
Elsewhere it is several times slower than float32. Three ways to compute the same product stand behind one
interface here; `fastest_method` measures which one this machine likes for a shape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol, Self, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vattention.native import Largest, LinearWeight, Noise, ScreenCopy, WeightFormat, kernels
from vattention.native.huge import Empty, huge_empty

COLUMNS = 32
"""Output columns in a panel of a weight packed for linear.c."""

_TILE_STEPS = 32
"""Inputs that a matrix tile takes at a time."""

_MOST_SCREENED = 1 << 16
"""Inputs of a screened layer whose products of bytes 32 bits can surely sum."""

_MOST_RESTS = 8
"""Steps without a screen after several that were of no use."""


class LinearMethod(Protocol):
    """One way to compute y = x W^T + b for a weight [out, in] it holds in a form of its own.

    Attributes:
        name: for reports.
        exact: whether the form holds the weight as it was given.
        nbytes: memory of the weight in this form.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    nbytes: int

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, empty: Empty = huge_empty) -> Self:
        """Brings the weight, and the bias [out] if there is one, into this form; `empty` makes memory for ours."""
        ...

    @classmethod
    def available(cls, dtype: torch.dtype) -> bool:
        """Whether this machine can do it for weights of this type."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """y[rows, out] for x[rows, in] of the weight's type; rows may be 0 and strides anything."""
        ...

    def weight(self) -> Tensor:
        """The weight [out, in] as it was given, or what stands for it; a new tensor where the form differs."""
        ...


class TorchLinear:
    """`F.linear` on the weight as it is; from `widen_rows` rows in float32, blocks of the weight after another.

    Widening a bfloat16 block once and multiplying in float32 costs less than emulated bfloat16 arithmetic where
    enough rows share the block. It needs no copy of the weight.
    """

    name: ClassVar[str] = "torch"
    exact: ClassVar[bool] = True
    widen_rows: ClassVar[int] = 32
    block_nbytes: ClassVar[int] = 4 << 20

    def __init__(self, weight: Tensor, bias: Tensor | None, *, widen: bool = False) -> None:
        self._weight, self._bias = weight, bias
        self._widen = widen and weight.dtype != torch.float32
        self._block = max(1, self.block_nbytes // (4 * weight.shape[1]))
        self.nbytes = weight.nbytes

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, empty: Empty = huge_empty) -> Self:
        return cls(weight, bias)

    @classmethod
    def available(cls, dtype: torch.dtype) -> bool:
        return True

    def __call__(self, x: Tensor) -> Tensor:
        if not self._widen or x.shape[0] < self.widen_rows:
            return F.linear(x, self._weight, self._bias)
        y = x.new_empty(x.shape[0], self._weight.shape[0])
        wide = x.float()
        for start in range(0, self._weight.shape[0], self._block):
            part = slice(start, start + self._block)
            bias = None if self._bias is None else self._bias[part].float()
            y[:, part] = F.linear(wide, self._weight[part].float(), bias)
        return y

    def weight(self) -> Tensor:
        return self._weight


class WideningLinear(TorchLinear):
    """`TorchLinear` that widens."""

    name: ClassVar[str] = "widening"

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, empty: Empty = huge_empty) -> Self:
        return cls(weight, bias, widen=True)

    @classmethod
    def available(cls, dtype: torch.dtype) -> bool:
        return dtype in (torch.bfloat16, torch.float16)


class OneDnnLinear:
    """oneDNN's product with a weight reordered once instead of in each call."""

    name: ClassVar[str] = "onednn"
    exact: ClassVar[bool] = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias
        self._shape = weight.shape
        self.nbytes = weight.nbytes

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, empty: Empty = huge_empty) -> Self:
        return cls(weight, bias)

    @classmethod
    def available(cls, dtype: torch.dtype) -> bool:
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return False
        if dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return dtype == torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self._shape[0])
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._packed, self._bias, "none", [], "")
        return y

    def weight(self) -> Tensor:
        return self._packed.to_dense().view(self._shape)


class NativeLinear:
    """The kernel of native/linear.c: one packed copy of the weight, computed in float32 at any number of rows."""

    name: ClassVar[str] = "native"
    exact: ClassVar[bool] = True
    form: ClassVar[WeightFormat] = WeightFormat.PLAIN

    def __init__(self, weight: Tensor, bias: Tensor | None, empty: Empty = huge_empty) -> None:
        library = kernels()
        if library is None:
            raise RuntimeError("the compiled kernels are not there; ask available() first")
        self._kernels = library
        self._num_out, self._num_in = weight.shape
        self._dtype = weight.dtype
        self._panels = self._packed(weight, empty)
        self._bias = None if bias is None else F.pad(bias.float(), (0, -self._num_out % COLUMNS))
        self._native = LinearWeight.of(
            self._panels, self._bias, self._num_out, self._num_in, self._dtype, self.form
        )
        self.nbytes = self._panels.nbytes
        self._screen: Screen | None = None

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, empty: Empty = huge_empty) -> Self:
        return cls(weight, bias, empty)

    @classmethod
    def available(cls, dtype: torch.dtype) -> bool:
        library = kernels()
        return library is not None and dtype in library.dtypes

    @classmethod
    def has_tiles(cls, num_in: int, dtype: torch.dtype) -> bool:
        """Whether matrix tiles multiply weights of this type and so many inputs."""
        library = kernels()
        return library is not None and library.has_tiles and dtype == torch.bfloat16 and num_in % _TILE_STEPS == 0

    def _packed(self, weight: Tensor, empty: Empty) -> Tensor:
        """The weight as the compiled code takes it."""
        return _panels_of(weight, empty)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self._dtype or x.shape[1] != self._num_in:
            raise RuntimeError(
                f"x is {x.dtype} of {x.shape[1]} columns; the weight is {self._dtype} of {self._num_in}"
            )
        y = x.new_empty(x.shape[0], self._num_out)
        self.write(x, y)
        return y

    @property
    def num_out(self) -> int:
        return self._num_out

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def native(self) -> LinearWeight:
        """The weight as the compiled code takes it, good as long as this."""
        return self._native

    def write(self, x: Tensor, y: Tensor) -> None:
        """The product into contiguous y[rows, out], of the weight's type or float32."""
        if x.shape[0] > 0:
            self._kernels.linear(self._native, x if x.stride(1) == 1 else x.contiguous(), y)

    def largest(self, x: Tensor, noise: Noise | None = None) -> Largest:
        """Each row's first largest output, NaN counting as largest: its index and its value before rounding.

        Args:
            noise: of each row, added before outputs are compared, and in the value.
        """
        if x.shape[0] == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        x = x if x.stride(1) == 1 else x.contiguous()
        if self._screen is None or x.shape[0] > self._screen.most_rows or self._screen.take_rest():
            return self._kernels.largest(self._native, x, noise)
        largest, useful = self._kernels.screened_largest(self._native, self._screen.copy, x, noise)
        self._screen.note(useful)
        return largest

    def screen(self) -> bool:
        """Let `largest` read about half as much memory, with the same results: by a copy of the weight in 8 bits.

        Whether this was done: it takes a processor with the instructions, bfloat16, plain or quantized in halves,
        sums that fit into 32 bits, and no bias.
        """
        if self._kernels.can_screen and self._bias is None and self._dtype == torch.bfloat16:
            screen = self._screen_of()
            if screen is not None and self._kernels.screen(screen.copy, self._native):
                self._screen = screen
        return self._screen is not None

    def _screen_of(self) -> Screen | None:
        """A screen, not filled in, for a bfloat16 layer that one fits."""
        if self._num_in > _MOST_SCREENED:
            return None
        num_panels, num_steps = math.ceil(self._num_out / COLUMNS), math.ceil(self._num_in / 64) * 16
        numbers = huge_empty(num_panels * num_steps * COLUMNS * 4, torch.int8)
        scales, errors = torch.empty(2, num_panels * COLUMNS)
        sums = torch.empty(num_panels * COLUMNS, dtype=torch.int32)
        return Screen((numbers, scales, errors, sums), self._num_out, num_steps)

    def weight(self) -> Tensor:
        rows = self._panels.transpose(1, 2).reshape(self._panels.shape[0] * COLUMNS, -1)
        return rows[: self._num_out, : self._num_in].contiguous()


class Screen:
    """Memory of what finds a weight's largest products, as screen.c or screen_halves.c describes it, not filled in.

    Where a model is at a loss, with thousands of tokens about equally likely, a screen is work for nothing. The
    next tokens may be no better, so it rests, twice as long each time.

    Args:
        tensors: numbers, scales, errors and sums, as `vattention_screen` has them.
        most_rows: for which it takes less time than computing everything.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        num_out: int,
        num_steps: int,
        most_rows: float = math.inf,
    ) -> None:
        self._tensors = tensors
        self.most_rows = most_rows
        self.copy = ScreenCopy(*(tensor.data_ptr() for tensor in tensors), num_out, num_steps)
        self._num_rests = 0
        self._next_rests = 1

    def take_rest(self) -> bool:
        """Whether to do without it this time; asked once in each step."""
        rests = self._num_rests > 0
        self._num_rests -= rests
        return rests

    def note(self, useful: bool) -> None:
        """What came of using it."""
        if useful:
            self._next_rests = 1
        else:
            self._num_rests = self._next_rests
            self._next_rests = min(2 * self._next_rests, _MOST_RESTS)


def _panels_of(weight: Tensor, empty: Empty) -> Tensor:
    """Panels for linear.c: [ceil(out / 32), in, 32] float32 numbers, or
    [ceil(out / 32), ceil(in / 2), 32, 2] of bfloat16.
    """
    num_out, num_in = weight.shape
    num_panels, width = math.ceil(num_out / COLUMNS), 4 // weight.itemsize
    num_steps = math.ceil(num_in / width)
    panels = empty(num_panels * num_steps * width * COLUMNS, weight.dtype)
    panels = panels.view(num_panels, num_steps, COLUMNS, width)
    whole = num_out // COLUMNS
    rest = F.pad(weight[whole * COLUMNS :], (0, 0, 0, -num_out % COLUMNS))
    for part, rows in ((panels[:whole], weight[: whole * COLUMNS]), (panels[whole:], rest)):
        if len(part):
            # A column's numbers of a step move as one.
            whole_steps = rows if num_steps * width == num_in else F.pad(rows, (0, 1))
            words = _as_words(whole_steps).view(-1, COLUMNS, num_steps)
            part.view(torch.int32).squeeze(3).copy_(words.transpose(1, 2))
    return panels


def _as_words(rows: Tensor) -> Tensor:
    """Rows of an even number of bytes by four as int32, of the same memory where that begins at a word."""
    rows = rows.contiguous()
    return (rows.clone() if rows.storage_offset() * rows.itemsize % 4 else rows).view(torch.int32)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module in processor memory does what `nn.Linear` does: subclasses and hooks may do more."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and module.weight.numel() > 0
    )


@contextmanager
def standing_for(method: LinearMethod, *linears: nn.Linear) -> Iterator[None]:
    """Inside the block, layers whose weights were packed as one have those that the packed form stands for."""
    if method.exact:
        yield
        return
    weights = torch.split(method.weight(), [linear.out_features for linear in linears])
    originals = [linear.weight for linear in linears]
    try:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for linear, original in zip(linears, originals, strict=True):
            linear.weight = original


METHODS: tuple[type[LinearMethod], ...] = (TorchLinear, WideningLinear, OneDnnLinear, NativeLinear)
"""All methods; the first is what `nn.Linear` does."""


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, by one of the methods above. It has no parameters and no gradients."""

    def __init__(self, method: LinearMethod, in_features: int, out_features: int) -> None:
        super().__init__()
        self.method = method
        self.in_features = in_features
        self.out_features = out_features

    @classmethod
    def of(cls, linear: nn.Linear, method: type[LinearMethod], empty: Empty = huge_empty) -> PackedLinear:
        """A replacement of `linear`, which stays as it is."""
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(method.pack(linear.weight.detach(), bias, empty), linear.in_features, linear.out_features)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in]; unpacked in each access, which takes long."""
        return self.method.weight()

    def forward(self, x: Tensor) -> Tensor:
        """y[..., out] for x[..., in]."""
        y = self.method(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, method={self.method.name}"


_MEASURED_ROWS = (1, 8, 64)
"""A lone decode, a small batch of decodes, and the fewest rows at which computing bounds all methods."""
_MEASURED_NUMEL = 1 << 19
_REPEATS = 4
_WORTHWHILE = 0.9


def fastest_method(num_out: int, num_in: int, dtype: torch.dtype) -> type[LinearMethod]:
    """The method of the least geometric mean time at 1, 8 and 64 rows, as measured here and now.

    Where there are matrix tiles for a type, nothing is measured: `NativeLinear` has been the fastest on them, whole
    layers run in it alone, and a measurement beside busy processes may say anything.

    A large weight is stood for by a part of its rows; the measurement takes some ten milliseconds. It runs on
    one thread, and each method's least time counts: other processes add to a time and, where two
    threads wait for each other, multiply it. `TorchLinear` wins unless another takes less than 0.9 of its time,
    for packing copies the weight.
    """
    if NativeLinear in METHODS and NativeLinear.has_tiles(num_in, dtype):
        return NativeLinear
    num_out = max(1, min(num_out, _MEASURED_NUMEL // num_in))
    weight = _random(num_out, num_in, dtype)
    candidates = [method for method in METHODS if method.available(dtype)]
    packed = [method.pack(weight, None) for method in candidates]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scores = [_mean_log_time(method, num_in, dtype) for method in packed]
    finally:
        torch.set_num_threads(num_threads)
    best = min(range(len(packed)), key=scores.__getitem__)
    return candidates[best] if math.exp(scores[best] - scores[0]) < _WORTHWHILE else candidates[0]


def _mean_log_time(method: LinearMethod, num_in: int, dtype: torch.dtype) -> float:
    total = 0.0
    for rows in _MEASURED_ROWS:
        x = _random(rows, num_in, dtype)
        times = []
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            method(x)
            times.append(time.perf_counter() - begin)
        total += math.log(min(times))
    return total / len(_MEASURED_ROWS)


def _random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random numbers that leave torch's global generator as it is."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
