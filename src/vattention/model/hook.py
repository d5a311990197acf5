"""Putting a function of ours in the place of a model's attention, through transformers' attention interface.

Every hook registers under a name of its own, so that several models, or several runners of one, never meet, and the
function finds what it needs in its closure: some models drop unknown keyword arguments on the way to their layers,
so nothing else would reach it. For a name without a mask function transformers builds no attention mask at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from vattention.errors import UnsupportedModelError

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""(module, query [1, H, T, D], key, value, attention_mask, **keywords) → ([1, T, H, value_dim], weights)."""


class AttentionHook:
    """`function` computes the model's attention from now until `close`.

    Args:
        mask: makes the attention masks; None for no masks at all.

    Raises:
        UnsupportedModelError: the model's attention does not go through the interface.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        function: AttentionFunction,
        mask: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self._model = model
        self._name = f"vattention_{uuid4().hex}"
        self._previous = implementation(model)
        AttentionInterface.register(self._name, function)
        if mask is not None:
            AttentionMaskInterface.register(self._name, mask)
        try:
            set_implementation(model, self._name)
        except BaseException:
            self._unregister()
            raise

    def replace(self, function: AttentionFunction) -> None:
        """Let another function compute it from now on; hooking it anew goes through the whole model."""
        AttentionInterface.register(self._name, function)

    @contextmanager
    def suspended(self, name: str) -> Iterator[None]:
        """Let the model compute with an implementation of its own, such as "eager", inside the block."""
        set_implementation(self._model, name)
        try:
            yield
        finally:
            set_implementation(self._model, self._name)

    def close(self) -> None:
        """Give the model back the implementation it had. Calling it again does nothing."""
        if implementation(self._model) == self._name:
            set_implementation(self._model, self._previous)
        self._unregister()

    def _unregister(self) -> None:
        # The interfaces' own `del` reaches only names set on one instance, not registered ones.
        AttentionInterface._global_mapping.pop(self._name, None)
        AttentionMaskInterface._global_mapping.pop(self._name, None)


def implementation(model: PreTrainedModel) -> str:
    """Name of the attention implementation that the model's text layers use."""
    name: Any = model.config.get_text_config()._attn_implementation
    return str(name or "eager")


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Switch a model to a registered attention implementation.

    Raises:
        UnsupportedModelError: the model's code does not take part in the attention interface.
    """
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(model).__name__} computes its attention itself; only models whose attention goes through "
            "transformers' attention interface can use this KV cache"
        )
    model.set_attn_implementation(name)
