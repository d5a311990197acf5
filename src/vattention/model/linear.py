"""Linear layers for inference: what each way to compute one offers, and the module that stands on one.

torch multiplies bfloat16 well only where the processor has bfloat16 instructions (AVX512_BF16, AMX, recent Arm).
Elsewhere it is several times slower than float32. So there are several ways to compute the same product, of which
`linear_methods.py` knows all, and the fastest for a shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol, Self, TypeGuard

import torch
from torch import Tensor, nn

from vattention.native.huge import Empty, huge_empty


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


class PackedLinear(nn.Module):
    """`nn.Linear` for inference, by a method of its own. It has no parameters and no gradients."""

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


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module does what `nn.Linear` does: subclasses and hooks may do more."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
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
