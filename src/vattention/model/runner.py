"""Forward passes of ragged batches: chunks of several sequences in, logits out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from vattention.attention.kernel import RaggedBatch
from vattention.attention.registry import AUTO, choose
from vattention.core import Chunk
from vattention.errors import UnsupportedModelError
from vattention.kv.manager import KVManager
from vattention.model.batch_attention import BatchAttention, Place
from vattention.model.decoder_stack import DecoderStack
from vattention.model.head import HiddenStates, Scratch, plain_output_layer
from vattention.model.hook import AttentionHook
from vattention.model.predictions import GivenLogits, Predictions
from vattention.model.probe import ModelAttention


class ModelRunner:
    """Runs a model over a KV cache that somebody else manages.

    The tokens of all sequences go through the model as one row, [1, T], each with its position in its own sequence;
    only attention knows where one sequence ends and the next begins.

    Args:
        model: in evaluation mode, on one device.
        attention: what `probe` found in it.
        kv: a cache with one layer for each of `attention.cache_specs`.
        kernel: an attention kernel's name, "auto" for the fastest that can, layer by layer.

    Raises:
        ConfigError: the named kernel cannot compute one of the layers.
        UnsupportedModelError: the model's attention does not go through transformers' interface.
    """

    def __init__(
        self, model: PreTrainedModel, attention: ModelAttention, kv: KVManager, kernel: str = AUTO
    ) -> None:
        self._model = model
        self._device = model.device
        places = {}
        for index, layer in enumerate(attention.layers):
            view = kv.layer(layer.cache_layer)
            chosen = choose(kernel, layer.spec, view)
            places[model.get_submodule(layer.name)] = Place(index, layer.spec, view, layer.writes, chosen)
        self._attention = BatchAttention(places)
        self._scratch = Scratch()
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._hook = AttentionHook(model, self._attention)
        with self.suspended():
            self._output_layer = plain_output_layer(model)
        self._stack = None if self._output_layer is None else DecoderStack.of(model, self._attention)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The attention kernel of each layer, by name."""
        return tuple(place.kernel.name for place in self._attention.places.values())

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """`predict`, as logits.

        Returns:
            [sum of num_logits, vocabulary] float32, in the order of the chunks.
        """
        predictions = self.predict(chunks)
        return predictions.logits(range(len(predictions))).clone()

    def predict(self, chunks: Sequence[Chunk]) -> Predictions:
        """Compute the chunks, store their keys and values, and return the rows of logits they ask for, in order.

        The cache must have memory for them (`KVManager.ensure`), and hold the tokens before them.
        """
        batch = RaggedBatch.of(chunks, self._device)
        token_ids: list[int] = []
        wanted: list[int] = []
        for chunk in chunks:
            token_ids.extend(chunk.token_ids)
            wanted.extend(range(len(token_ids) - chunk.num_logits, len(token_ids)))
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([token_ids], dtype=torch.int64, device=self._device),
            "position_ids": batch.positions.unsqueeze(0),
            "use_cache": False,
        }
        self._attention.begin(batch)
        try:
            with torch.inference_mode():
                predictions = self._predictions(batch, inputs, wanted)
        finally:
            self._attention.end()
        num_attended, num_layers = self._attention.num_attended, len(self._attention.places)
        if num_attended != num_layers:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} called {num_attended} of {num_layers} attention layers in a forward "
                "pass; each must be called exactly once"
            )
        return predictions

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside the block the model computes with its own plain attention, without the cache."""
        with self._hook.suspended("eager"):
            yield

    def close(self) -> None:
        """Give the model back as it was. The cache remains its owner's to close."""
        self._hook.close()
        self._attention = BatchAttention({})
        self._stack = None

    def _predictions(self, batch: RaggedBatch, inputs: dict[str, Any], wanted: list[int]) -> Predictions:
        rows = torch.tensor(wanted, dtype=torch.int64, device=self._device)
        if self._stack is not None and self._output_layer is not None and self._stack.takes(batch):
            hidden = self._stack(inputs["input_ids"][0], batch)
            return HiddenStates(hidden[rows], self._output_layer, self._scratch)
        if not wanted:
            self._model.base_model(**inputs)
            vocab_size = self._model.config.get_text_config().vocab_size
            return GivenLogits(torch.empty(0, vocab_size, device=self._device))
        if self._output_layer is not None:
            hidden = self._model.base_model(**inputs).last_hidden_state[0]
            return HiddenStates(hidden[rows], self._output_layer, self._scratch)
        if self._keeps_rows:
            logits: torch.Tensor = self._model(**inputs, logits_to_keep=rows).logits[0]
        else:
            logits = self._model(**inputs).logits[0, rows]
        return GivenLogits(self._scratch.widened(logits))
