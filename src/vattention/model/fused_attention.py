"""The way into attention in two passes instead of thirty small operations: one product for queries, keys and
values, then head norms and rotary embeddings in place.

It fits modules built as Llama's is, by the names most models use. What a module computes besides, and what it
tells its attention function, is not read from its code: it is run with a function that takes notes, and a
replacement that gives other notes or another result is not used.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vattention.model.fused import FusedRMSNorm
from vattention.model.linear import LinearMethod, is_plain_linear, standing_for
from vattention.model.row_kernels import RowKernels
from vattention.native.huge import Empty, huge_empty

_log = logging.getLogger(__name__)

_UNDERSTOOD = frozenset({"hidden_states", "position_embeddings", "attention_mask", "past_key_values"})
"""Parameters of an attention module that a fused one knows the meaning of."""


class Projections(NamedTuple):
    """The parts of an attention module that lie between its input and its attention function."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    @classmethod
    def of(cls, module: nn.Module) -> Projections | None:
        """The parts of `module` if it looks like such a one."""
        parts = dict(module.named_children())
        q_proj, k_proj, v_proj = (parts.get(name) for name in ("q_proj", "k_proj", "v_proj"))
        head_dim = getattr(module, "head_dim", None)
        parameters = inspect.signature(module.forward).parameters.values()
        if (
            "o_proj" in parts
            and q_proj is not None
            and k_proj is not None
            and v_proj is not None
            and is_plain_linear(q_proj)
            and is_plain_linear(k_proj)
            and is_plain_linear(v_proj)
            and isinstance(head_dim, int)
            and head_dim % 2 == 0
            and all(part.out_features % head_dim == 0 for part in (q_proj, k_proj, v_proj))
            and q_proj.in_features == k_proj.in_features == v_proj.in_features
            and q_proj.weight.dtype == k_proj.weight.dtype == v_proj.weight.dtype
            and (q_proj.bias is None) == (k_proj.bias is None) == (v_proj.bias is None)
            and hasattr(getattr(module, "config", None), "_attn_implementation")
            and hasattr(sys.modules[type(module).__module__], "eager_attention_forward")
            and "forward" not in vars(module)
            and {"hidden_states", "position_embeddings"} <= {p.name for p in parameters}
            and all(p.name in _UNDERSTOOD for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD)
        ):
            return cls(q_proj, k_proj, v_proj)
        return None

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of all three as one weight."""
        return sum(part.out_features for part in self), self.q_proj.in_features


class PartialLinear(nn.Module):
    """Some outputs of a product, for whoever calls the module that this was a part of in an unusual way."""

    def __init__(self, method: LinearMethod, begin: int, end: int) -> None:
        super().__init__()
        self._method = method
        self._outputs = slice(begin, end)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in]; unpacked in each access, which takes long."""
        return self._method.weight()[self._outputs]

    def forward(self, x: Tensor) -> Tensor:
        """y[..., out] for x[..., in]."""
        y = self._method(x.reshape(-1, x.shape[-1]))[:, self._outputs]
        return y.reshape(*x.shape[:-1], -1)


class FusedAttention:
    """The `forward` of an attention module, for calls without transformers' own cache; others go to the module's.

    Args:
        method: for queries, keys and values.
        keywords: what the module adds to what it passes on to its attention function.
    """

    def __init__(
        self,
        rows: RowKernels,
        module: Any,
        parts: Projections,
        method: type[LinearMethod],
        keywords: dict[str, Any],
        empty: Empty,
    ) -> None:
        weight = torch.cat([part.weight.detach() for part in parts])
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        self.method = method.pack(weight, torch.cat(biases) if biases else None, empty)
        self._row_kernels = rows
        self._module = module
        self._original: Callable[..., tuple[Tensor, Tensor | None]] = module.forward
        self._keywords = keywords
        self._taken = frozenset(inspect.signature(module.forward).parameters)
        self._config = module.config
        self._eager = sys.modules[type(module).__module__].eager_attention_forward
        self._dtype = weight.dtype
        self._head_dim: int = module.head_dim
        self._widths = [part.out_features for part in parts]
        self._num_heads = [width // self._head_dim for width in self._widths]
        # The rotation points into the norms' scales.
        self._norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        query, key = (None if norm is None else (norm.scale, norm.epsilon) for norm in self._norms)
        num_heads = self._num_heads[0], self._num_heads[1]
        self._rotation = rows.rotation(num_heads, (query, key), self._head_dim, sum(self._widths), weight.dtype)

    @property
    def head_dim(self) -> int:
        return self._head_dim

    @property
    def rotation(self) -> Any:
        """How queries and keys are normalised and rotated, as the kernels take it; good as long as this."""
        return self._rotation

    def install(self) -> None:
        """Make the module run this from now on, and drop the weights it does not need any more."""
        begin = 0
        for name, width in zip(Projections._fields, self._widths, strict=True):
            setattr(self._module, name, PartialLinear(self.method, begin, begin + width))
            begin += width
        self._module.forward = self

    def __call__(self, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        hidden = args[0] if len(args) == 1 else None if args else keywords.get("hidden_states")
        embeddings = keywords.get("position_embeddings")
        if hidden is None or embeddings is None or keywords.get("past_key_values") is not None:
            return self._original(*args, **keywords)
        cosines, sines = embeddings
        shape = hidden.shape[:-1]
        expected = (*shape, self._head_dim)
        if not (
            hidden.dtype == cosines.dtype == sines.dtype == self._dtype
            and cosines.shape == sines.shape == expected
            and cosines.is_contiguous()
            and sines.is_contiguous()
        ):
            return self._original(*args, **keywords)
        x = self.method(hidden.reshape(-1, hidden.shape[-1]))
        self._row_kernels.rotate(self._rotation, x, cosines, sines)
        heads = torch.split(x.view(*shape, -1, self._head_dim).transpose(1, 2), self._num_heads, 1)
        passed_on = {name: value for name, value in keywords.items() if name not in self._taken}
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self._config._attn_implementation, self._eager)
        attended, weights = attend(
            self._module, *heads, keywords.get("attention_mask"), **self._keywords, **passed_on
        )
        y: Tensor = self._module.o_proj(attended.reshape(*shape, -1))
        return y, weights


@dataclass(slots=True)
class Notes:
    """An attention function that notes what it is given, and returns something that depends on all of it."""

    calls: list[tuple[list[Tensor], dict[str, Any]]] = field(default_factory=list)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, None]:
        self.calls.append(([query, key, value], keywords))
        num_groups = query.shape[1] // key.shape[1]
        mixed = query + (key + value).repeat_interleave(num_groups, dim=1)
        return mixed.transpose(1, 2).contiguous(), None


def fuse(
    rows: RowKernels,
    module: nn.Module,
    parts: Projections,
    method: type[LinearMethod],
    notes: Notes,
    difference: Callable[[Tensor, Tensor], float],
    empty: Empty = huge_empty,
) -> tuple[FusedAttention, float] | None:
    """A replacement of the module's forward, not yet installed, and how far its results are off.

    None for modules of another kind.

    Args:
        notes: what computes the model's attention at the moment.
        difference: compares results [rows, width] with what they should be.
        empty: makes memory for the packed weight.
    """
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if any(norm is not None and not isinstance(norm, FusedRMSNorm) for norm in norms):
        return None
    try:
        _, _, keywords = _trial(module.forward, module, parts, 1, notes)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        _log.info("a %s is not like Llama's attention: %s", type(module).__name__, error)
        return None
    del keywords[_SENTINEL]
    fused = FusedAttention(rows, module, parts, method, keywords, empty)
    largest = 0.0
    for num_tokens in (1, 5, 33):
        with standing_for(fused.method, *parts):
            expected, expected_inputs, expected_keywords = _trial(module.forward, module, parts, num_tokens, notes)
        result, inputs, keywords = _trial(fused, module, parts, num_tokens, notes)
        if not _same(keywords, expected_keywords):
            return None
        for own, wanted in zip((*inputs, result), (*expected_inputs, expected), strict=True):
            if own.shape != wanted.shape:
                return None
            largest = max(largest, difference(_rows(own), _rows(wanted)))
    return fused, largest


_SENTINEL = "vattention_passed_on"


def _trial(
    forward: Callable[..., Any], module: nn.Module, parts: Projections, num_tokens: int, notes: Notes
) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """The result of a forward for random input, and what its attention function was given.

    Raises:
        ValueError: it did not call the function once, or does not pass on what it does not know.
    """
    generator = torch.Generator().manual_seed(num_tokens)
    dtype = parts.q_proj.weight.dtype
    hidden = torch.randn(1, num_tokens, parts.q_proj.in_features, generator=generator)
    device = parts.q_proj.weight.device
    # Not true angles: halves that differ show which half goes where.
    cosines, sines = torch.randn(2, 1, num_tokens, int(module.head_dim), generator=generator).to(device, dtype)  # type: ignore[arg-type]
    notes.calls.clear()
    outputs = forward(
        hidden_states=hidden.to(device, dtype),
        position_embeddings=(cosines, sines),
        attention_mask=None,
        **{_SENTINEL: num_tokens},
    )
    if len(notes.calls) != 1 or len(outputs) != 2:
        raise ValueError(f"{len(notes.calls)} calls of attention, {len(outputs)} results")
    inputs, keywords = notes.calls.pop()
    if keywords.get(_SENTINEL) != num_tokens:
        raise ValueError("keywords are not passed on")
    return outputs[0], inputs, keywords


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] or _equal(a[name], b[name]) for name in a)


def _equal(a: Any, b: Any) -> bool:
    return not isinstance(a, Tensor) and type(a) is type(b) and bool(a == b)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
