"""What fused modules compute of each row by itself, on the device their weights are on."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from vattention.native import kernels

_log = logging.getLogger(__name__)


class RowKernels(Protocol):
    """Norms, rotary embeddings and gates, each in one pass over memory.

    Attributes:
        dtypes: of all tensors but scales, which are float32.
        device_type: where all tensors are.
    """

    @property
    def dtypes(self) -> frozenset[torch.dtype]: ...

    @property
    def device_type(self) -> str: ...

    def rms_norm(self, x: Tensor, scale: Tensor, epsilon: float, y: Tensor) -> None:
        """y = x / sqrt(mean(x^2) + epsilon) * scale over rows of scale's length, dense, in the order of memory."""
        ...

    def gate(self, gate_up: Tensor, linear: float, cubic: float, y: Tensor) -> None:
        """y[rows, n] = f(g) u of contiguous gate_up[rows, 2n] = (g, u); f(x) = x sigmoid(x (linear + cubic x²))."""
        ...

    def rotation(
        self,
        num_heads: tuple[int, int],
        norms: tuple[tuple[Tensor, float] | None, tuple[Tensor, float] | None],
        head_dim: int,
        width: int,
        dtype: torch.dtype,
    ) -> Any:
        """What `rotate` is to do, in a form of its own.

        Args:
            num_heads: of queries and of keys.
            norms: of their heads: scale [head_dim] float32, which the caller keeps alive, and epsilon.
            width: of a token's row, which begins with its query and key heads.
        """
        ...

    def rotate(self, rotation: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> None:
        """In place: normalises and rotates the query and key heads of contiguous x[tokens, width].

        cosines and sines are contiguous [tokens, head_dim], of x's type.
        """
        ...


@cache
def row_kernels(device: torch.device) -> RowKernels | None:
    """Those for a device; None where it has none that work."""
    if device.type == "cpu":
        compiled = kernels()
        return None if compiled is None else compiled.rowwise
    if device.type != "cuda":
        return None
    if find_spec("triton") is None:
        _log.warning("the package triton is not installed: norms, rotary embeddings and gates run as many kernels")
        return None
    from vattention.model.triton_rows import TritonRows

    rows = TritonRows()
    try:
        x = torch.ones(2, 16, device=device)
        rows.rms_norm(x, x[0].clone(), 0.0, x)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever stands between Triton, its compiler and the driver
        _log.warning("Triton's kernels cannot be used: %s", error)
        return None
    return rows
