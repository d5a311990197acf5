"""Whether a model computes through the cache what it computes by itself. No flag tells, so it is tried at load."""

from __future__ import annotations

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
        UnsupportedModelError: they differ, or an attention layer did not run exactly once in a forward.
        OutOfMemoryError: the cache cannot hold even these prompts.
    """
    vocab_size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(vocab_size, (min(length, kv.max_len),), generator=generator).tolist()
        for length in _LENGTHS[: kv.num_free_slots]
    ]
    with runner.suspended(), torch.inference_mode():
        own = torch.cat([_own_logits(model, prompt) for prompt in prompts])
    difference = max(
        _difference(_logits_through(runner, kv, prompts, cuts), own)
        for cuts in (
            [0] * len(prompts),
            [len(prompt) // 2 for prompt in prompts],
            [len(prompt) - 1 for prompt in prompts],
        )
    )
    bound = TOLERANCE[model.dtype]
    # Written so that NaN counts as a difference.
    if not difference <= bound:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else through the cache than by itself: its logits differ "
            f"by {difference:.2g} of their norm, and {bound:.2g} is allowed in {model.dtype}"
        )
    return difference


def _own_logits(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits
    return logits[0].float()


def _logits_through(
    runner: ModelRunner, kv: KVManager, prompts: Sequence[Sequence[int]], cuts: Sequence[int]
) -> torch.Tensor:
    """All prompts' logits, one prompt after the other, each computed in two chunks that meet at its cut."""
    slots: list[int] = []
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    try:
        for prompt in prompts:
            slots.append(kv.take(prompt).slot)
        ends = [len(prompt) for prompt in prompts]
        for starts, stops in (([0] * len(prompts), cuts), (cuts, ends)):
            chunks = [
                Chunk(slot, start, prompt[start:stop], stop - start)
                for slot, prompt, start, stop in zip(slots, prompts, starts, stops, strict=True)
            ]
            if not any(chunk.num_logits for chunk in chunks):
                continue
            for chunk in chunks:
                kv.ensure(chunk.slot, chunk.start, chunk.end)
            rows = torch.split(runner.forward(chunks), [chunk.num_logits for chunk in chunks])
            for part, logits in zip(parts, rows, strict=True):
                part.append(logits)
    finally:
        for slot in slots:
            kv.release(slot)
        kv.drop_warm()
    return torch.cat([logits for part in parts for logits in part])


def _difference(logits: torch.Tensor, own: torch.Tensor) -> float:
    logits, own = (rows - rows.mean(-1, keepdim=True) for rows in (logits, own))
    return float((logits - own).norm() / own.norm())
