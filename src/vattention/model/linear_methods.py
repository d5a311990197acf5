"""All ways to compute a linear layer, and which of them this machine likes for a shape."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from vattention.model.linear import LinearMethod
from vattention.model.native_linear import NativeLinear
from vattention.model.torch_linear import OneDnnLinear, TorchLinear, WideningLinear

METHODS: tuple[type[LinearMethod], ...] = (TorchLinear, WideningLinear, OneDnnLinear, NativeLinear)
"""All methods; the first is what `nn.Linear` does."""

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
