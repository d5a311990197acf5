"""Linear layers by torch's and oneDNN's products."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from vattention.native.huge import Empty, huge_empty


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
