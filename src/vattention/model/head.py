"""From hidden states to next tokens: the output layer, the largest weight of a small model with a large vocabulary.

Logits of 262,144 tokens and 32 sequences are 33 MB in float32, and fresh memory costs more than the numbers in it.
So those that are wanted go to memory that is used again, and whoever asks for the likeliest tokens alone, or for
samples, gets them without any logits in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vattention.model.linear import PackedLinear
from vattention.model.native_linear import NativeLinear
from vattention.native import Largest, Noise

_log = logging.getLogger(__name__)

_KEPT_NUMBERS = 1 << 24
"""Most logits whose memory is kept for the next forward."""

_SCREENED_NBYTES = 32 << 20
"""Output layers from this size on, beyond most caches, are worth a screen that finds next tokens."""


class HiddenStates:
    """Predictions from the last hidden states [R, hidden] and the output layer."""

    def __init__(self, hidden: Tensor, layer: NativeLinear, scratch: Scratch) -> None:
        self._hidden = hidden
        self._layer = layer
        self._scratch = scratch

    def __len__(self) -> int:
        return self._hidden.shape[0]

    def logits(self, rows: Sequence[int]) -> Tensor:
        y = self._scratch.take(len(rows), self._layer.num_out)
        if len(rows):
            self._layer.write(self._hidden[list(rows)], y)
        return y

    def likeliest(self, rows: Sequence[int], noise: Noise | None = None) -> Largest:
        everything = list(rows) == list(range(len(self)))
        return self._layer.largest(self._hidden if everything else self._hidden[list(rows)], noise)


class Scratch:
    """Memory for logits that one forward after the other uses."""

    def __init__(self) -> None:
        self._kept = torch.empty(0)

    def take(self, num_rows: int, width: int) -> Tensor:
        """Uninitialised float32 [num_rows, width], until the next call."""
        numel = num_rows * width
        if numel > _KEPT_NUMBERS:
            return torch.empty(num_rows, width)
        if numel > len(self._kept):
            self._kept = torch.empty(numel)
        return self._kept[:numel].view(num_rows, width)

    def widened(self, logits: Tensor) -> Tensor:
        """[R, V] as float32; on processors in this memory, unless they are that already."""
        if logits.is_cuda or logits.dtype == torch.float32:
            return logits.float()
        return self.take(*logits.shape).copy_(logits)


def plain_output_layer(model: PreTrainedModel) -> NativeLinear | None:
    """The output layer, if it runs on the compiled kernels and nothing comes after it.

    Models that cap or scale their logits, or whose hidden states cannot be had apart, compute something else with
    it than the plain product: a few tokens show, which the model computes by itself, without our cache.
    """
    module = model.get_output_embeddings()
    layer = module.method if isinstance(module, PackedLinear) else None
    if not isinstance(layer, NativeLinear) or model.base_model is model:
        return None
    token_ids = torch.arange(5)[None]
    with torch.inference_mode():
        logits = model(input_ids=token_ids, use_cache=False).logits
        hidden = getattr(model.base_model(input_ids=token_ids, use_cache=False), "last_hidden_state", None)
        same = (
            hidden is not None
            and hidden.dtype == layer.dtype
            and hidden.shape[-1] == module.in_features
            and torch.equal(module(hidden), logits)
        )
    if not same:
        return None
    if layer.nbytes >= _SCREENED_NBYTES and layer.screen():
        _log.debug("the output layer is screened")
    return layer
