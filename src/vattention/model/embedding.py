"""Embeddings looked up in compiled code: for a few tokens, torch's calls take longer than their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vattention.model.native_linear import NativeLinear
from vattention.model.quantized import QuantizedEmbedding, is_lookup, look_up
from vattention.native import EmbeddingRows, Int64s, Kernels, int64s

_NUM_TRIED = 64
"""Rows, and tokens from all over and at either end, that are compared."""

_MOST_KEPT_ROWS = 512
"""Whose memory is kept for the next batch."""


class Embedding(Protocol):
    """Of token ids their rows [len(token_ids), hidden]: contiguous, and good until the next call.

    Attributes:
        unheard: hooks that are not called.
    """

    unheard: Sequence[Mapping[int, Any]]

    def __call__(self, token_ids: Int64s) -> Tensor: ...


class ModuleEmbedding:
    """A model's own module."""

    unheard: Sequence[Mapping[int, Any]] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @torch.inference_mode()
    def __call__(self, token_ids: Int64s) -> Tensor:
        x: Tensor = self._model.get_input_embeddings()(torch.tensor(token_ids, dtype=torch.int64))
        return x.contiguous()


class CompiledEmbedding:
    """What a module gives that looks up rows and at most multiplies them by a number.

    Args:
        module: whose rows they are.
        dtype: of the rows.
    """

    def __init__(self, compiled: Kernels, module: nn.Module, rows: EmbeddingRows, dtype: torch.dtype) -> None:
        self.unheard: Sequence[Mapping[int, Any]] = (module._forward_hooks, module._forward_pre_hooks)
        self._kernels = compiled
        # Even if the module is given others.
        self._alive = module, list(module.parameters())
        self._rows = rows
        self._kept = torch.empty(0, rows.width, dtype=dtype)

    @classmethod
    @torch.no_grad()
    def of(cls, compiled: Kernels, module: nn.Module) -> Embedding | None:
        """The same as a module in processor memory; None where that does anything else."""
        if isinstance(module, QuantizedEmbedding) and isinstance(module.method, NativeLinear):
            rows, table, dtype = EmbeddingRows.of_packed(module.method.native), module.table, module.method.dtype
        elif is_lookup(module) and module.weight.is_contiguous() and module.weight.dtype in compiled.dtypes:
            rows, table, dtype = EmbeddingRows.of_table(module.weight), module, module.weight.dtype
        else:
            return None
        factor = _factor(table, dtype)
        if factor is None or module._forward_hooks or module._forward_pre_hooks:
            return None
        rows.factor = factor
        made = cls(compiled, module, rows, dtype)
        tried = _tried(table, rows.num)
        return made if torch.equal(made(int64s(tried.tolist())), module(tried)) else None

    def __call__(self, token_ids: Int64s) -> Tensor:
        x = self._kept
        if x.shape[0] != len(token_ids):
            x = x.new_empty(len(token_ids), x.shape[1])
            if len(token_ids) <= _MOST_KEPT_ROWS:
                self._kept = x
        self._kernels.rowwise.embed(self._rows, token_ids, x)
        return x


def _tried(table: nn.Embedding, num: int) -> Tensor:
    """Token ids from all over, and those at either end and of padding, which a model may treat in its own way."""
    ends = [*range(min(num, _NUM_TRIED)), *range(max(0, num - _NUM_TRIED), num)]
    padding = [] if table.padding_idx is None else [table.padding_idx]
    return torch.cat([torch.linspace(0, num - 1, _NUM_TRIED).long(), torch.tensor(ends + padding)])


def _factor(table: nn.Embedding, dtype: torch.dtype) -> float | None:
    """What an embedding multiplies its rows by, if it does no more: as seen on rows that it does not know."""
    shape = _NUM_TRIED, table.embedding_dim
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[0] = 1.0
    try:
        given = look_up(table, rows)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
        return None
    factor = float(given[0, 0])
    return factor if given.dtype == dtype and torch.equal(given, rows * factor) else None
