"""A greedy loop around a runner, and what it must equal: the smallest engine there can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vattention.core import Chunk
from vattention.kv.manager import KVManager
from vattention.model.runner import ModelRunner


@dataclass(slots=True)
class _Running:
    index: int
    slot: int
    token_ids: list[int]
    end: int
    num_computed: int = 0


def greedy(
    runner: ModelRunner,
    kv: KVManager,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    max_chunk: int = 7,
    max_batch: int = 24,
) -> list[list[int]]:
    """`num_tokens` greedy tokens of each prompt, first come first served in whatever slots are free.

    Args:
        max_chunk: most tokens of one sequence in a forward.
        max_batch: most tokens of all.
    """
    waiting = list(enumerate(prompts))[::-1]
    running: list[_Running] = []
    outputs: dict[int, list[int]] = {}
    while waiting or running:
        while waiting and kv.num_free_slots:
            index, prompt = waiting.pop()
            slot = kv.take(prompt).slot
            running.append(_Running(index, slot, list(prompt), len(prompt) + num_tokens))
        room = max_batch
        chunks = []
        computing = []
        for sequence in running:
            count = min(len(sequence.token_ids) - sequence.num_computed, max_chunk, room)
            if count == 0:
                continue
            start = sequence.num_computed
            end = start + count
            kv.ensure(sequence.slot, start, end)
            is_last = end == len(sequence.token_ids)
            chunks.append(Chunk(sequence.slot, start, sequence.token_ids[start:end], int(is_last)))
            computing.append(sequence)
            room -= count
        tokens = iter(runner.forward(chunks).argmax(-1).tolist())
        for sequence, chunk in zip(computing, chunks, strict=True):
            sequence.num_computed = chunk.end
            if chunk.num_logits:
                sequence.token_ids.append(next(tokens))
        for sequence in [sequence for sequence in running if len(sequence.token_ids) == sequence.end]:
            running.remove(sequence)
            kv.release(sequence.slot)
            outputs[sequence.index] = sequence.token_ids[sequence.end - num_tokens :]
    return [outputs[index] for index in range(len(prompts))]


def generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The same by `model.generate`, with prompts of equal length in one batch, so that nothing is padded."""
    outputs: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        indices = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        tokens = model.generate(
            torch.tensor([prompts[index] for index in indices]),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
        )
        for index, row in zip(indices, tokens[:, length:].tolist(), strict=True):
            outputs[index] = row
    return [outputs[index] for index in range(len(prompts))]
