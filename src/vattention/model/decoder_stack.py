"""All decoder layers of a model in one call.

Between the layers of a small model transformers spends as much time as the layers take from one another to fetch
their weights. What a model does before, between and behind its layers is not read from its code: layers that only
listen show what goes in and comes out, and a model that does more than look up embeddings, hand on what each layer
gave and normalise at the end goes its own way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vattention.attention.kernel import RaggedBatch
from vattention.model.batch_attention import BatchAttention
from vattention.model.embedding import CompiledEmbedding, Embedding, ModuleEmbedding
from vattention.model.fused import FusedRMSNorm
from vattention.model.fused_layer import FusedLayer
from vattention.model.rotary import Pair, RotaryTables
from vattention.native import Kernels, Norm, StackedLayer, Workspace, int64s, kernels

_ANY_LEN = 2048
"""Positions of a model that names no number of them."""


class DecoderStack:
    """From token ids to the last hidden states, through layers that are fused already.

    Args:
        embed: the model's embedding.
        hooks: what is or will be called around the modules that this stands for.
        layers: in order.
        kinds: which of `rotary`'s tables each layer takes.
    """

    def __init__(
        self,
        compiled: Kernels,
        embed: Embedding,
        hooks: Sequence[Mapping[int, Any]],
        layers: Sequence[FusedLayer],
        kinds: Sequence[int],
        norm: FusedRMSNorm,
        rotary: RotaryTables,
        attention: BatchAttention,
    ) -> None:
        self._kernels = compiled
        self._embed = embed
        self._hooks = hooks
        self._rotary = rotary
        self._attention = attention
        caches = [attention.cache(layer.attention_module, layer.dtype) for layer in layers]
        # The structures point into all of these.
        self._alive = layers, norm, caches
        self._norm = Norm.of(norm.scale, norm.epsilon)
        self._layers = (StackedLayer * len(layers))(
            *(
                StackedLayer.of(layer.native, cache, kind)
                for layer, cache, kind in zip(layers, caches, kinds, strict=True)
                if cache is not None
            )
        )
        self._workspace = Workspace()
        self._prefills = all(layer.prefills for layer in layers)

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, attention: BatchAttention) -> Self | None:
        """A stack of the model's layers, if all are fused and it does nothing else between them.

        Args:
            attention: over the cache, with the places of these layers.
        """
        compiled = kernels()
        modules = [module for module in model.modules() if isinstance(vars(module).get("forward"), FusedLayer)]
        layers: list[FusedLayer] = [vars(module)["forward"] for module in modules]
        if (
            compiled is None
            or not layers
            or [layer.attention_module for layer in layers] != list(attention.places)
            or any(attention.cache(layer.attention_module, layer.dtype) is None for layer in layers)
            or any(_hooks(model))
        ):
            return None
        listener = _Listener(model.base_model, modules, layers)
        embed = CompiledEmbedding.of(compiled, model.get_input_embeddings()) or ModuleEmbedding(model)
        max_len = int(getattr(model.config.get_text_config(), "max_position_embeddings", _ANY_LEN))
        sample = torch.arange(5), torch.tensor([0, 1, 2, 5, max_len - 1])
        heard = listener.hear(*sample)
        norm = None if heard is None else _norm_of(model.base_model, heard)
        if (
            heard is None
            or norm is None
            or heard.embedded.dtype != layers[0].dtype
            or not torch.equal(embed(int64s(sample[0].tolist())), heard.embedded)
        ):
            return None
        kinds = [
            next(i for i, other in enumerate(heard.pairs) if all(map(torch.equal, other, pair)))
            for pair in heard.pairs
        ]
        first_of_kind = sorted(set(kinds))

        @torch.no_grad()
        def compute(positions: Tensor) -> list[Pair]:
            heard = listener.hear(torch.zeros_like(positions), positions)
            if heard is None:
                raise RuntimeError(f"{type(model).__name__} treats some positions differently from others")
            return [heard.pairs[index] for index in first_of_kind]

        # Embeddings that depend on the other positions of a batch are in no table.
        alone = [compute(position[None]) for position in sample[1]]
        for index, kind in enumerate(first_of_kind):
            for which in range(2):
                rows = torch.cat([pairs[index][which] for pairs in alone])
                if not torch.equal(rows, heard.pairs[kind][which]):
                    return None
        rotary = RotaryTables(compute, max_len)
        # What fused layers stand for is not called by themselves either.
        inside = {module for layer in modules for module in layer.modules() if module is not layer}
        hooks = [*_hooks(model, inside), *embed.unheard]
        numbers = [first_of_kind.index(kind) for kind in kinds]
        return cls(compiled, embed, hooks, layers, numbers, norm, rotary, attention)

    def takes(self, batch: RaggedBatch) -> bool:
        """Whether the layers compute such a batch: without matrix tiles, sequences must bring one token each; and a
        hook that somebody put on a module would not be called."""
        return (self._prefills or batch.is_decode) and not any(self._hooks)

    def __call__(self, token_ids: Sequence[int], batch: RaggedBatch, wanted: Sequence[int]) -> Tensor:
        """Hidden states [len(wanted), hidden] for a batch that it takes, good until the next call.

        Stores the batch's keys and values.

        Args:
            token_ids: T of them.
            wanted: which of the T rows to return, in ascending order.
        """
        self._attention.claim_all()
        last = max(start + num_rows for _, _, num_rows, start in batch.spans) - 1
        x = self._embed(int64s(token_ids))
        parts = batch.parts(1)
        self._kernels.decoder.stack(
            *(self._layers, self._norm, parts.short, parts.long_spans),
            *(self._rotary.up_to(last), self._workspace, x, int64s(wanted)),
        )
        return x if len(wanted) == len(token_ids) else x[: len(wanted)]


def _hooks(model: PreTrainedModel, inside: Collection[nn.Module] = ()) -> list[Mapping[int, Any]]:
    """What is or will be called before and after the modules that a stack stands for, but for those `inside`."""
    left_out = {model.get_input_embeddings(), *inside}
    modules = (module for module in model.base_model.modules() if module not in left_out)
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def _norm_of(model: nn.Module, heard: _Heard) -> FusedRMSNorm | None:
    """The norm that a model applies to what its last layer gives, if that is all it does."""
    for child in model.children():
        if isinstance(child, FusedRMSNorm) and torch.equal(child(heard.answered), heard.output):
            return child
    return None


class _Listener:
    """Hears what a model gives its decoder layers, by taking their place and answering with random numbers.

    Args:
        model: without its output layer.
        modules: the decoder layers, whose `forward` is in `layers`.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], layers: Sequence[FusedLayer]) -> None:
        self._model = model
        self._modules = modules
        self._layers = layers

    def hear(self, token_ids: Tensor, positions: Tensor) -> _Heard | None:
        """What one forward pass of tokens [T] at positions [T] shows; None if its layers are more than a row of
        layers."""
        generator = torch.Generator().manual_seed(0)
        hidden, dtype = self._layers[0].hidden, self._layers[0].dtype
        # The same for all tokens: random numbers for thousands of them would take longer than the rest.
        rows = torch.randn(len(self._modules), 1, 1, hidden, generator=generator).to(dtype)
        answers = [row.expand(1, len(token_ids), hidden) for row in rows]
        calls: list[tuple[int, Tensor, Any]] = []

        def listen(index: int) -> Any:
            def forward(hidden: Tensor, *_: Any, position_embeddings: Any = None, **__: Any) -> Tensor:
                calls.append((index, hidden, position_embeddings))
                answer: Tensor = answers[index]
                return answer.clone()

            return forward

        for index, module in enumerate(self._modules):
            module.forward = listen(index)
        try:
            output = self._model(input_ids=token_ids[None], position_ids=positions[None], use_cache=False)
        finally:
            for module, layer in zip(self._modules, self._layers, strict=True):
                module.forward = layer
        inputs = [hidden for _, hidden, _ in calls]
        last = getattr(output, "last_hidden_state", None)
        if (
            [index for index, _, _ in calls] != list(range(len(self._modules)))
            or not all(torch.equal(hidden, answer) for hidden, answer in zip(inputs[1:], answers, strict=False))
            or not all(self._is_pair(pair, len(token_ids)) for _, _, pair in calls)
            or not isinstance(last, Tensor)
        ):
            return None
        pairs = [(cosines[0], sines[0]) for _, _, (cosines, sines) in calls]
        return _Heard(inputs[0][0], pairs, answers[-1][0], last[0])

    def _is_pair(self, pair: Any, num_tokens: int) -> bool:
        shape = (1, num_tokens, self._layers[0].head_dim)
        return (
            isinstance(pair, tuple)
            and len(pair) == 2
            and all(isinstance(one, Tensor) and one.shape == shape for one in pair)
            and all(one.dtype == self._layers[0].dtype for one in pair)
        )


class _Heard(NamedTuple):
    """A forward pass of T tokens.

    Attributes:
        embedded: what the first layer got, [T, hidden].
        pairs: the rotary embeddings that each layer got.
        answered: what the last layer gave.
        output: what became of that.
    """

    embedded: Tensor
    pairs: list[Pair]
    answered: Tensor
    output: Tensor
