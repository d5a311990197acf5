"""Modules that compute in one pass over memory what transformers' modules compute in many small operations.

A root mean square norm is about ten operations there and a gated feed-forward block five, each with a price per
call that a decode step of few rows pays hundreds of times. Both need kernels of ours. What a module computes
is guessed from names and attributes here; whoever replaces it compares results.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vattention.model.linear import LinearMethod, PackedLinear, is_plain_linear
from vattention.model.row_kernels import RowKernels
from vattention.native.huge import Empty, huge_empty


class FusedRMSNorm(nn.Module):
    """A root mean square norm over the last dimension; inputs of a type other than the weight's go to the original.

    Attributes:
        original: the module this stands for, whose attributes some models read.
        scale: [width] float32 factors.
        epsilon: added to the mean of squares.
    """

    def __init__(
        self, rows: RowKernels, original: nn.Module, weight: nn.Parameter, offset: float, epsilon: float
    ) -> None:
        super().__init__()
        self.original = original
        self.weight = weight
        self._row_kernels = rows
        self.scale = weight.detach().float() + offset
        self.epsilon = epsilon
        self._dtype = weight.dtype

    @classmethod
    def guesses(cls, rows: RowKernels, norm: nn.Module) -> Iterator[FusedRMSNorm]:
        """Replacements of a norm, of which one may be right.

        Models scale by the weight or, as Gemma does, by weight + 1.
        """
        weight = getattr(norm, "weight", None)
        epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if (
            "RMSNorm" in type(norm).__name__
            and isinstance(weight, nn.Parameter)
            and weight.dim() == 1
            and weight.dtype in rows.dtypes
            and weight.device.type == rows.device_type
            and len(list(norm.parameters())) == 1
            and isinstance(epsilon, float)
            and len(inspect.signature(norm.forward).parameters) == 1
        ):
            for offset in (0.0, 1.0):
                yield cls(rows, norm, weight, offset, epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x[..., width], laid out in memory as x is."""
        if x.dtype != self._dtype:
            y: Tensor = self.original(x)
            return y
        out = torch.empty_like(x)
        if out.stride() != x.stride() or x.stride(-1) != 1:
            # The kernel walks memory: no gaps, and rows in one piece.
            x = x.contiguous()
            out = torch.empty_like(x)
        self._row_kernels.rms_norm(x, self.scale, self.epsilon, out)
        return out


class Gate(NamedTuple):
    """The activation x sigmoid(x (linear + cubic x^2))."""

    linear: float
    cubic: float


_SILU = Gate(1.0, 0.0)
_GELU_TANH = Gate(2.0 * math.sqrt(2.0 / math.pi), 0.044715 * 2.0 * math.sqrt(2.0 / math.pi))


def _gate_of(activation: nn.Module) -> Gate | None:
    """The gate that computes the same, if there is one."""
    x = torch.linspace(-8.0, 8.0, 257)
    y = activation(x)
    for gate in (_SILU, _GELU_TANH):
        if torch.allclose(y, x * torch.sigmoid(x * (gate.linear + gate.cubic * x * x)), rtol=1e-4, atol=1e-5):
            return gate
    return None


class GatedMLP(NamedTuple):
    """The parts of down(f(gate(x)) * up(x))."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    gate: Gate

    @classmethod
    def of(cls, module: nn.Module) -> GatedMLP | None:
        """The parts of `module` if it looks like such a block, by the names most models use."""
        parts = dict(module.named_children())
        if set(parts) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            return None
        gate_proj, up_proj, down_proj = parts["gate_proj"], parts["up_proj"], parts["down_proj"]
        if not (is_plain_linear(gate_proj) and is_plain_linear(up_proj) and is_plain_linear(down_proj)):
            return None
        gate = _gate_of(parts["act_fn"])
        same = (
            gate_proj.weight.shape == up_proj.weight.shape
            and (gate_proj.bias is None) == (up_proj.bias is None)
            and gate_proj.weight.dtype == up_proj.weight.dtype == down_proj.weight.dtype
            and down_proj.in_features == gate_proj.out_features
            and len(inspect.signature(module.forward).parameters) == 1
        )
        return cls(gate_proj, up_proj, down_proj, gate) if gate is not None and same else None

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """[out, in] of gate and up as one weight, and of down."""
        width, num_in = self.gate_proj.weight.shape
        return (2 * width, num_in), (self.down_proj.out_features, width)


class FusedGatedMLP(nn.Module):
    """A gated feed-forward block with gate and up as one product, and the activation and its factor as one pass."""

    def __init__(
        self,
        rows: RowKernels,
        mlp: GatedMLP,
        gate_up: type[LinearMethod],
        down: type[LinearMethod],
        empty: Empty = huge_empty,
    ) -> None:
        super().__init__()
        parts = (mlp.gate_proj, mlp.up_proj)
        weight = torch.cat([part.weight.detach() for part in parts])
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        self._row_kernels = rows
        self.gate = mlp.gate
        self.dtype = mlp.gate_proj.weight.dtype
        self._width = mlp.gate_proj.out_features
        self.gate_up = PackedLinear(
            gate_up.pack(weight, torch.cat(biases) if biases else None, empty),
            mlp.gate_proj.in_features,
            2 * self._width,
        )
        self.down = PackedLinear.of(mlp.down_proj, down, empty)
        self.nbytes = self.gate_up.method.nbytes + self.down.method.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """y[..., out] for x[..., in]."""
        gate_up: Tensor = self.gate_up(x).view(-1, 2 * self._width)
        hidden = gate_up.new_empty(gate_up.shape[0], self._width)
        self._row_kernels.gate(gate_up, self.gate.linear, self.gate.cubic, hidden)
        y: Tensor = self.down(hidden)
        return y.view(*x.shape[:-1], y.shape[-1])
