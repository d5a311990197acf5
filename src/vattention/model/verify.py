"""Whether a model computes through the cache what it computes by itself. No flag tells, so it is tried at load."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from vattention.core import Chunk
from vattention.errors import UnsupportedModelError
from vattention.kv.manager import KVManager
from vattention.model.runner import ModelRunner

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest difference of the logits, by the Euclidean norm, relative to the model's own.

Both without each row's mean, which no probability depends on. float32 leaves room for sums in another order, the
others for a few units in the last place per layer. A mistake in what a token sees makes a difference of about 1.
"""

_LENGTHS = (11, 6)


def verify(model: PreTrainedModel, runner: ModelRunner, kv: KVManager) -> float:
    """Run two prompts, or as many as there are free slots, through the model's own path and through the cache.

    The model computes them one by one. Through the cache they go together, three times: whole, in two chunks each,
    and with a last chunk of one token.

    Returns:
        The larger relative difference of the logits.

    Raises:
        UnsupportedModelError: they differ, an attention layer did not run exactly once in a forward, or what the
            model computes by itself says nothing.
        OutOfMemoryError: the cache cannot hold even these prompts.
    """
    vocab_size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(vocab_size, (min(length, kv.max_len),), generator=generator).tolist()
        for length in _LENGTHS[: kv.num_free_slots]
    ]
    with runner.suspended(), torch.inference_mode():
        own = [[_centred(row) for row in _own_logits(model, prompt)] for prompt in prompts]
    size = math.sqrt(sum(float(row.norm()) ** 2 for rows in own for row in rows))
    if not 0 < size < math.inf:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes {'nothing but equal' if size == 0 else 'NaN or infinite'} logits by "
            f"itself: its weights are damaged or missing, or need more range than {model.dtype} has; get them "
            "anew, or try dtype='float32'"
        )
    differences = [
        _difference_through(runner, kv, prompts, cuts, own) / size
        for cuts in (
            [0] * len(prompts),
            [len(prompt) // 2 for prompt in prompts],
            [len(prompt) - 1 for prompt in prompts],
        )
    ]
    # NaN counts as the largest.
    difference = max(differences, key=lambda one: (math.isnan(one), one))
    bound = TOLERANCE[model.dtype]
    if not difference <= bound:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else through the cache than by itself: its logits differ "
            f"by {difference:.2g} of their norm, and {bound:.2g} is allowed in {model.dtype}"
        )
    return difference


def _own_logits(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits
    return logits[0]


def _centred(row: torch.Tensor) -> torch.Tensor:
    """Logits [V] without their mean, which no probability depends on."""
    return row.float() - row.float().mean()


def _difference_through(
    runner: ModelRunner,
    kv: KVManager,
    prompts: Sequence[Sequence[int]],
    cuts: Sequence[int],
    own: Sequence[Sequence[torch.Tensor]],
) -> float:
    """How far the logits through the cache are off when each prompt is computed in two chunks that meet at its cut,
    by the Euclidean norm over all of them.

    Rows are compared one by one, while they are in a processor's cache.
    """
    slots: list[int] = []
    square = 0.0
    try:
        for prompt in prompts:
            slots.append(kv.take(prompt).slot)
        ends = [len(prompt) for prompt in prompts]
        for starts, stops in (([0] * len(prompts), cuts), (cuts, ends)):
            chunks = [
                Chunk(slot, start, prompt[start:stop], stop - start)
                for slot, prompt, start, stop in zip(slots, prompts, starts, stops, strict=True)
            ]
            expected = [
                row for rows, start, stop in zip(own, starts, stops, strict=True) for row in rows[start:stop]
            ]
            if not expected:
                continue
            for chunk in chunks:
                kv.ensure(chunk.slot, chunk.start, chunk.end)
            predictions = runner.predict(chunks)
            with torch.no_grad():
                for logits, row in zip(predictions.logits(range(len(predictions))), expected, strict=True):
                    square += float((_centred(logits) - row).norm()) ** 2
    finally:
        for slot in slots:
            kv.release(slot)
        kv.drop_warm()
    return math.sqrt(square)
