"""Linear layers with weights in 8 or 4 bits, and embeddings that read the output layer's copy of them."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vattention.model.linear import LinearMethod
from vattention.model.native_linear import NativeLinear
from vattention.model.panels import COLUMNS
from vattention.model.quantize import GROUP, Format, HalvedInt8, Int4, Int8, pack, unpack, unpack_rows
from vattention.model.screen import Screen
from vattention.native import WeightFormat, kernels
from vattention.native.huge import Empty, huge_empty

_MOST_SCREENED_ROWS = 3
"""For which reading the upper halves takes longer than multiplying them."""


class QuantizedMethod(LinearMethod, Protocol):
    """A way to compute with a quantized weight, whose `weight` is what the numbers in memory stand for.

    Attributes:
        kind: of those numbers.
    """

    kind: ClassVar[type[Format]]

    def rows(self, indices: Tensor) -> Tensor:
        """Rows [len(indices), in] of `weight`, without unpacking the others."""
        ...


class _NativeQuantized(NativeLinear):
    """The kernels of native/quantized.c, which multiply x as it is by whole numbers and then by their scales."""

    exact: ClassVar[bool] = False
    kind: ClassVar[type[Format]]

    def _packed(self, weight: Tensor, empty: Empty) -> Tensor:
        return pack(self.kind, weight, empty)

    def _screen_of(self) -> Screen | None:
        return None

    def weight(self) -> Tensor:
        return unpack(self.kind, self._panels, self._num_out, self._num_in, self._dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows [len(indices), in] of `weight`, without unpacking the others."""
        return unpack_rows(self.kind, self._panels, indices, self._num_in, self._dtype)


class Int8Linear(_NativeQuantized):
    """8 bits."""

    name: ClassVar[str] = "int8"
    form: ClassVar[WeightFormat] = WeightFormat.INT8
    kind: ClassVar[type[Format]] = Int8


class HalvedInt8Linear(_NativeQuantized):
    """8 bits in halves, of which `largest` reads the upper ones, and few of the others."""

    name: ClassVar[str] = "int8"
    form: ClassVar[WeightFormat] = WeightFormat.HALVES
    kind: ClassVar[type[Format]] = HalvedInt8

    @classmethod
    def available(cls, dtype: torch.dtype) -> bool:
        library = kernels()
        return library is not None and library.products.can_screen and dtype == torch.bfloat16

    def _screen_of(self) -> Screen | None:
        nothing = torch.empty(0)
        errors = torch.empty(2 * math.ceil(self._num_out / COLUMNS) * COLUMNS)
        num_steps = math.ceil(self._num_in / GROUP) * GROUP // 4
        return Screen((nothing, nothing, errors, nothing), self._num_out, num_steps, _MOST_SCREENED_ROWS)


class Int4Linear(_NativeQuantized):
    """4 bits."""

    name: ClassVar[str] = "int4"
    form: ClassVar[WeightFormat] = WeightFormat.INT4
    kind: ClassVar[type[Format]] = Int4


class _Unpacking:
    """The same weights without compiled kernels: unpacked in blocks for each product. Slow, but as small."""

    exact: ClassVar[bool] = False
    kind: ClassVar[type[Format]]
    block_numel: ClassVar[int] = 1 << 20

    def __init__(self, weight: Tensor, bias: Tensor | None, empty: Empty = huge_empty) -> None:
        self._num_out, self._num_in = weight.shape
        self._dtype = weight.dtype
        self._panels = pack(self.kind, weight, empty)
        self._bias = bias
        self.nbytes = self._panels.nbytes

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, empty: Empty = huge_empty) -> Self:
        return cls(weight, bias, empty)

    @classmethod
    def available(cls, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point

    def __call__(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], self._num_out)
        step = math.ceil(self.block_numel / (COLUMNS * self._num_in))
        for start in range(0, len(self._panels), step):
            part = slice(start * COLUMNS, min((start + step) * COLUMNS, self._num_out))
            panels = self._panels[start : start + step]
            weight = unpack(self.kind, panels, part.stop - part.start, self._num_in, self._dtype)
            y[:, part] = F.linear(x, weight, None if self._bias is None else self._bias[part])
        return y

    def weight(self) -> Tensor:
        return unpack(self.kind, self._panels, self._num_out, self._num_in, self._dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows [len(indices), in] of `weight`, without unpacking the others."""
        return unpack_rows(self.kind, self._panels, indices, self._num_in, self._dtype)


class UnpackingInt8(_Unpacking):
    """8 bits."""

    name: ClassVar[str] = "int8, unpacked"
    kind: ClassVar[type[Format]] = Int8


class UnpackingInt4(_Unpacking):
    """4 bits."""

    name: ClassVar[str] = "int4, unpacked"
    kind: ClassVar[type[Format]] = Int4


_INT8: tuple[type[QuantizedMethod], ...] = (Int8Linear, UnpackingInt8)
_INT4: tuple[type[QuantizedMethod], ...] = (Int4Linear, UnpackingInt4)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What becomes of a model's linear layers: methods, best first, for most, delicate ones and the output."""

    most: tuple[type[QuantizedMethod], ...]
    delicate: tuple[type[QuantizedMethod], ...]
    output: tuple[type[QuantizedMethod], ...]

    def method(self, dtype: torch.dtype, *, delicate: bool = False, output: bool = False) -> type[QuantizedMethod]:
        """The best method that this machine has for weights that came in this type."""
        methods = self.output if output else self.delicate if delicate else self.most
        return next(method for method in methods if method.available(dtype))


_OUTPUT: tuple[type[QuantizedMethod], ...] = (HalvedInt8Linear, *_INT8)

QUANTIZATIONS = {
    "int8": Quantization(_INT8, _INT8, _OUTPUT),
    "int4": Quantization(_INT4, _INT8, _OUTPUT),
}
"""By the engine's option. The output layer decides between tokens directly. Delicate is the way into attention: in
4 bits it makes a quarter of a small model's divergence, and is a small part of a layer."""


def is_way_into_attention(name: str) -> bool:
    """Whether a linear layer makes queries, keys or values, by the names most models use."""
    return re.match(r"(q|k|v|kv|qkv)_|query_key_value$|W?qkv$", name.rpartition(".")[2]) is not None


class QuantizedEmbedding(nn.Module):
    """An embedding tied to a quantized output layer: it reads that layer's rows, and needs no weight of its own.

    Args:
        embedding: what this stands for; what it computes beside looking up, such as scaling, it computes here too.

    Attributes:
        method: the output layer's.
        table: the embedding, without its weight.
    """

    def __init__(self, embedding: nn.Embedding, method: QuantizedMethod) -> None:
        super().__init__()
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.method = method
        self.table = copy.copy(embedding)
        self.table._parameters = {}

    @property
    def weight(self) -> Tensor:
        """The weight [num_embeddings, dim]; unpacked in each access, which takes long."""
        return self.method.weight()

    def forward(self, token_ids: Tensor) -> Tensor:
        """[..., dim] for ids [...]."""
        return look_up(self.table, self.method.rows(token_ids.flatten())).view(*token_ids.shape, self.embedding_dim)


def look_up(embedding: nn.Embedding, rows: Tensor) -> Tensor:
    """What an embedding for which `is_lookup` is true makes of rows [n, dim], if it had these and no others."""
    own = copy.copy(embedding)
    own._parameters = {}
    own.padding_idx = None
    vars(own)["weight"] = rows
    y: Tensor = own(torch.arange(len(rows)))
    return y


def is_lookup(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether a module in processor memory is an embedding that can stand on another table."""
    return (
        isinstance(module, nn.Embedding)
        and set(module._parameters) == {"weight"}
        and module.max_norm is None
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and module.weight.device.type == "cpu"
    )
