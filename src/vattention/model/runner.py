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
from vattention.model.cuda_graphs import Capture
from vattention.model.decode_graphs import CaptureReport, DecodeGraphs
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
        self._kv = kv
        self._graphs: DecodeGraphs | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The attention kernel of each layer, by name."""
        return tuple(place.kernel.name for place in self._attention.places.values())

    @property
    def screen_nbytes(self) -> int:
        """Memory of what finds likely tokens in the output layer, which comes to that of the model's weights."""
        return 0 if self._output_layer is None else self._output_layer.screen_nbytes

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
        replayed = None if self._graphs is None else self._graphs.logits(chunks)
        if replayed is not None:
            rows = [row for row, chunk in enumerate(chunks) if chunk.num_logits]
            return GivenLogits(replayed if len(rows) == len(replayed) else replayed[rows])
        batch = RaggedBatch.of(chunks, self._device)
        token_ids: list[int] = []
        wanted: list[int] = []
        for chunk in chunks:
            token_ids.extend(chunk.token_ids)
            wanted.extend(range(len(token_ids) - chunk.num_logits, len(token_ids)))
        with self._attending(batch):
            if self._stack is not None and self._output_layer is not None and self._stack.takes(batch):
                hidden = self._stack(token_ids, batch, wanted)
                return HiddenStates(hidden, self._output_layer, self._scratch)
            return self._by_modules(batch, token_ids, wanted)

    @property
    def uncapturable(self) -> str | None:
        """Why decode steps cannot be CUDA graphs, or None if nothing is known to stand in the way."""
        kernels = (place.kernel for place in self._attention.places.values())
        return next((f"{kernel.name}: {kernel.uncapturable}" for kernel in kernels if kernel.uncapturable), None)

    def capture(self, capture: Capture) -> CaptureReport:
        """Run decode steps as graphs from now on, those for short sequences captured at once.

        Raises:
            OutOfMemoryError, torch.OutOfMemoryError: as `DecodeGraphs` says; steps are then launched eagerly.
        """
        self.launch_eagerly()
        windows = {place.spec.window for place in self._attention.places.values()}
        width = self._model.get_output_embeddings().weight.shape[0]
        graphs = DecodeGraphs(self._every_row, capture, self._kv, windows, width=width, device=self._device)
        try:
            report = graphs.warm_up()
        except BaseException:
            graphs.close()
            raise
        self._graphs = graphs
        return report

    def launch_eagerly(self) -> None:
        """Run decode steps without graphs from now on."""
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside the block the model computes with its own plain attention, without the cache."""
        with self._hook.suspended("eager"):
            yield

    def close(self) -> None:
        """Give the model back as it was. The cache remains its owner's to close."""
        self.launch_eagerly()
        self._hook.close()
        self._attention = BatchAttention({})
        self._stack = None

    @contextmanager
    def _attending(self, batch: RaggedBatch) -> Iterator[None]:
        """Inside the block the model computes this batch, once."""
        self._attention.begin(batch)
        try:
            yield
        finally:
            self._attention.end()
        num_attended, num_layers = self._attention.num_attended, len(self._attention.places)
        if num_attended != num_layers:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} called {num_attended} of {num_layers} attention layers in a forward "
                "pass; each must be called exactly once"
            )

    def _every_row(self, token_ids: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        """[T, V]: the logits of every row, in the model's type."""
        with self._attending(batch):
            logits: torch.Tensor = self._model(**_inputs(token_ids, batch)).logits[0]
        return logits

    @torch.inference_mode()
    def _by_modules(self, batch: RaggedBatch, token_ids: list[int], wanted: list[int]) -> Predictions:
        inputs = _inputs(torch.tensor(token_ids, dtype=torch.int64, device=self._device), batch)
        if not wanted:
            self._model.base_model(**inputs)
            vocab_size = self._model.config.get_text_config().vocab_size
            return GivenLogits(torch.empty(0, vocab_size, device=self._device))
        rows = torch.tensor(wanted, dtype=torch.int64, device=self._device)
        if self._output_layer is not None:
            hidden = self._model.base_model(**inputs).last_hidden_state[0]
            return HiddenStates(hidden[rows], self._output_layer, self._scratch)
        if self._keeps_rows:
            logits: torch.Tensor = self._model(**inputs, logits_to_keep=rows).logits[0]
        else:
            logits = self._model(**inputs).logits[0, rows]
        return GivenLogits(self._scratch.widened(logits))


def _inputs(token_ids: torch.Tensor, batch: RaggedBatch) -> dict[str, Any]:
    """What a model is called with, for one row of tokens [T]."""
    return {"input_ids": token_ids[None], "position_ids": batch.positions[None], "use_cache": False}
