"""One forward pass, before it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field

from vattention.core import Chunk
from vattention.engine.sequence import Sequence
from vattention.errors import VAttentionError


@dataclass(slots=True)
class Plan:
    """One forward pass.

    Attributes:
        chunks: what to compute; `sequences` has their owners, in the same order.
        preempted: sequences that lost their slot to make room.
        failed: sequences that can never fit or that the driver fails, with the reason.
        num_tokens: of all chunks.
        num_looked_up_tokens: of sequences that got a slot; of these the prefix cache had `num_cached_tokens`.
    """

    chunks: list[Chunk] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, VAttentionError]] = field(default_factory=list)
    num_tokens: int = 0
    num_looked_up_tokens: int = 0
    num_cached_tokens: int = 0

    def put(self, sequence: Sequence, count: int) -> None:
        """Compute the sequence's next `count` tokens, for which its slot has memory."""
        assert sequence.slot is not None
        start, end = sequence.num_computed, sequence.num_computed + count
        num_logits = count if sequence.reports_prompt else int(end == sequence.num_tokens)
        self.chunks.append(Chunk(sequence.slot, start, sequence.token_ids(start, end), num_logits))
        self.sequences.append(sequence)
        self.num_tokens += count

    def withdraw(self, unit: list[Sequence]) -> None:
        """Compute nothing of these sequences."""
        kept = [(c, s) for c, s in zip(self.chunks, self.sequences, strict=True) if s not in unit]
        self.chunks, self.sequences = [chunk for chunk, _ in kept], [sequence for _, sequence in kept]
        self.num_tokens = sum(len(chunk.token_ids) for chunk in self.chunks)
