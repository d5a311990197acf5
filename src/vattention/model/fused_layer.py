"""Whole decoder layers in one call of compiled code.

In a decode step a small model computes for some microseconds at a time, and Python between the computations takes
as long; over a long prompt, fresh memory for what lies between them does. Without matrix tiles the layers take only
steps in which every sequence brings one token. A layer qualifies whose parts are fused already and
lie as Llama's or Gemma's do. Whether it adds them up in the same way is not read from its code: both are run on a
small cache, and other results mean that the layer stays.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vattention.attention.compiled import NativeKernel
from vattention.attention.kernel import RaggedBatch
from vattention.core import AttentionSpec, Chunk
from vattention.kv.manager import LayerView
from vattention.model.batch_attention import BatchAttention, Place
from vattention.model.difference import TOLERANCE, row_difference
from vattention.model.fused import FusedGatedMLP, FusedRMSNorm
from vattention.model.fused_attention import FusedAttention
from vattention.model.hook import AttentionHook
from vattention.model.linear import PackedLinear
from vattention.model.native_linear import NativeLinear
from vattention.model.probe import AttentionLayer, ModelAttention
from vattention.native import DecoderLayer, Kernels, Norm, Workspace, kernels

_log = logging.getLogger(__name__)

_KERNEL = NativeKernel()
_LAYER_TOLERANCE = 4
"""Times the tolerance of a single module: a layer rounds several times on the way."""


class Norms(NamedTuple):
    """Norms before and after attention, before and after the block behind it; None where there is none."""

    before_attention: FusedRMSNorm | None
    after_attention: FusedRMSNorm | None
    before_mlp: FusedRMSNorm | None
    after_mlp: FusedRMSNorm | None

    @classmethod
    def of(cls, norms: dict[str, nn.Module]) -> Norms | None:
        """By the names that models use. Llama's norm "after attention" is the one before the block behind it."""
        if not all(isinstance(norm, FusedRMSNorm) for norm in norms.values()):
            return None
        llama = ("input_layernorm", None, "post_attention_layernorm", None)
        gemma = (
            *("input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        )
        for names in (llama, gemma):
            if set(norms) == set(names) - {None}:
                return cls(*(None if name is None else norms[name] for name in names))  # type: ignore[arg-type]
        return None


class Parts(NamedTuple):
    """What a decoder layer consists of, all of it on the compiled kernels."""

    attention: FusedAttention
    query_key_value: NativeLinear
    attention_out: NativeLinear
    mlp: FusedGatedMLP
    gate_up: NativeLinear
    down: NativeLinear
    norms: Norms

    @classmethod
    def of(cls, layer: nn.Module) -> Parts | None:
        """The parts of `layer` if it looks like a decoder layer of such parts and no others."""
        children = dict(layer.named_children())
        attention, mlp = children.pop("self_attn", None), children.pop("mlp", None)
        norms = Norms.of(children)
        fused = getattr(attention, "forward", None)
        out = getattr(attention, "o_proj", None)
        if (
            norms is None
            or not isinstance(fused, FusedAttention)
            or not isinstance(out, PackedLinear)
            or not isinstance(mlp, FusedGatedMLP)
        ):
            return None
        linears = (fused.method, out.method, mlp.gate_up.method, mlp.down.method)
        if not all(isinstance(linear, NativeLinear) and linear.dtype == mlp.dtype for linear in linears):
            return None
        return cls(fused, linears[0], linears[1], mlp, linears[2], linears[3], norms)  # type: ignore[arg-type]


class FusedLayer:
    """The `forward` of a decoder layer, for batches that `BatchAttention` lets it have; others go to the module's.

    Args:
        attention_module: whose turn in the forward pass is this layer's.

    Attributes:
        prefills: whether sequences may bring more than one token.
    """

    def __init__(
        self,
        kernels: Kernels,
        layer: nn.Module,
        attention_module: nn.Module,
        parts: Parts,
        spec: AttentionSpec,
        workspace: Workspace,
    ) -> None:
        self._kernels = kernels
        self._original = layer.forward
        self._attention_module = attention_module
        self._config: Any = attention_module.config
        self._workspace = workspace
        self._head_dim = parts.attention.head_dim
        self._hidden = parts.down.num_out
        heads = _KERNEL.heads(spec)
        # The structure points into all of these.
        self._alive = parts, heads
        norms = (Norm() if norm is None else Norm.of(norm.scale, norm.epsilon) for norm in parts.norms)
        weights = (parts.query_key_value, parts.attention_out, parts.gate_up, parts.down)
        self._dtype = parts.mlp.dtype
        self._layer = DecoderLayer(
            *(ctypes.addressof(weight.native) for weight in weights),
            ctypes.addressof(parts.attention.rotation),
            ctypes.addressof(heads),
            *norms,
            *parts.mlp.gate,
            self._hidden,
            kernels.number_type(self._dtype),
        )
        self.prefills = kernels.attention.can_prefill(heads, self._dtype)

    @property
    def native(self) -> DecoderLayer:
        """The layer as the compiled code takes it, good as long as this."""
        return self._layer

    @property
    def attention_module(self) -> nn.Module:
        return self._attention_module

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def head_dim(self) -> int:
        return self._head_dim

    @property
    def hidden(self) -> int:
        return self._hidden

    def __call__(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
        embeddings = keywords.get("position_embeddings")
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self._config._attn_implementation, None)
        if isinstance(attend, BatchAttention) and embeddings is not None and self._fits(hidden_states, *embeddings):
            claimed = attend.claim(self._attention_module, self._dtype, self.prefills)
            if claimed is not None:
                cache, batch = claimed
                cosines, sines = embeddings
                x, parts = hidden_states.clone(), batch.parts(1)
                self._kernels.decoder.layer(
                    *(self._layer, cache, parts.short, parts.long_spans),
                    *(cosines[0], sines[0], self._workspace, x[0]),
                )
                return x
        return self._original(hidden_states, *args, **keywords)

    def _fits(self, hidden: Tensor, cosines: Tensor, sines: Tensor) -> bool:
        expected = (1, hidden.shape[-2], self._head_dim)
        return (
            hidden.dtype == cosines.dtype == sines.dtype == self._dtype
            and hidden.shape == (1, hidden.shape[-2], self._hidden)
            and cosines.shape == sines.shape == expected
            and hidden.is_contiguous()
            and cosines.is_contiguous()
            and sines.is_contiguous()
        )


@torch.no_grad()
def fuse_layers(model: PreTrainedModel, attention: ModelAttention) -> int:
    """Let decoder layers of an optimised model run in one call each, in place; returns how many do.

    Args:
        attention: what `probe` found in it.
    """
    compiled = kernels()
    if compiled is None:
        return 0
    workspace = Workspace()
    trial = _Trial(model)
    try:
        return sum(_fuse(compiled, model, own, workspace, trial) for own in attention.layers)
    finally:
        trial.close()


def _fuse(
    compiled: Kernels, model: PreTrainedModel, own: AttentionLayer, workspace: Workspace, trial: _Trial
) -> bool:
    """Let the decoder layer around one attention module run in one call, if it computes the same then."""
    name, _, last = own.name.rpartition(".")
    layer = model.get_submodule(name)
    if last != "self_attn" or "forward" in vars(layer) or own.spec.has_sinks or not own.writes:
        return False
    parts = Parts.of(layer)
    head_dim = None if parts is None else parts.attention.head_dim
    if parts is None or not own.spec.key_dim == own.spec.value_dim == head_dim or parts.mlp.dtype != model.dtype:
        return False
    module = model.get_submodule(own.name)
    fused = FusedLayer(compiled, layer, module, parts, own.spec, workspace)
    difference = trial.difference(layer, module, fused, own.spec)
    if not difference <= _LAYER_TOLERANCE * TOLERANCE[model.dtype]:
        _log.info("%s is no layer that can be fused: its results are off by %.2g", name, difference)
        return False
    layer.forward = fused
    return True


class _ClaimsOnly(BatchAttention):
    """For a layer that must not fall back on its module."""

    def __call__(self, *_: Any, **__: Any) -> tuple[Tensor, None]:
        raise RuntimeError("the layer went to its module")


_NUM_SLOTS, _MAX_LEN = 3, 192
_STEP = (Chunk(0, 0, [0], 1), Chunk(1, 5, [0], 1), Chunk(2, 38, [0], 1))
_PROMPT = (Chunk(2, 38, [0], 1), Chunk(1, 5, [0] * 140, 1), Chunk(0, 0, [0] * 3, 1))
"""With enough rows for products of many."""


class _Trial:
    """Runs layers of a model in both ways, for random inputs and a random cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._dtype = model.dtype
        self._hook = AttentionHook(model, BatchAttention({}))
        self._random: dict[tuple[int, ...], Tensor] = {}

    def close(self) -> None:
        self._hook.close()

    def difference(self, layer: nn.Module, module: nn.Module, fused: FusedLayer, spec: AttentionSpec) -> float:
        """How far the fused layer's results and cached tokens are off."""
        batches = [_STEP, _PROMPT] if fused.prefills else [_STEP]
        return max(self._difference_of(layer, module, fused, spec, RaggedBatch.of(batch)) for batch in batches)

    def _drawn(self, seed: int, *shape: int) -> Tensor:
        """Random numbers, the same for all layers."""
        if (seed, *shape) not in self._random:
            generator = torch.Generator().manual_seed(seed)
            self._random[seed, *shape] = torch.randn(*shape, generator=generator).to(self._dtype)
        return self._random[seed, *shape]

    def _difference_of(
        self, layer: nn.Module, module: nn.Module, fused: FusedLayer, spec: AttentionSpec, batch: RaggedBatch
    ) -> float:
        num_tokens = batch.num_tokens
        # Beside small hidden states, what the layer adds to them shows.
        scales = torch.tensor([1.0, 0.1, 0.01]).repeat(num_tokens)[:num_tokens, None]
        hidden = self._drawn(0, 1, num_tokens, fused.hidden) * scales.to(self._dtype)
        embeddings = tuple(self._drawn(seed, 1, num_tokens, spec.key_dim) for seed in (1, 2))
        filled = [
            self._drawn(seed, _NUM_SLOTS, _MAX_LEN, spec.num_kv_heads, dim)
            for seed, dim in ((3, spec.key_dim), (4, spec.value_dim))
        ]
        results = []
        for forward, kind in ((layer.forward, BatchAttention), (fused, _ClaimsOnly)):
            view = LayerView(*(numbers.clone() for numbers in filled))
            attention = kind({module: Place(0, spec, view, True, _KERNEL)})
            self._hook.replace(attention)
            attention.begin(batch)
            try:
                output = forward(hidden, position_embeddings=embeddings, attention_mask=None)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
                _log.info("a %s takes more than Llama's does: %s", type(layer).__name__, error)
                return float("inf")
            if not isinstance(output, Tensor) or output.shape != hidden.shape or attention.num_attended != 1:
                return float("inf")
            results.append((output[0], view.keys.flatten(1), view.values.flatten(1)))
        return max(row_difference(own, expected) for expected, own in zip(*results, strict=True))
