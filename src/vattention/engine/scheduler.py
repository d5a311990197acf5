"""Which sequences compute which tokens in the next forward pass.

Continuous batching with chunked prefill: every step gives each running sequence its next token and spends what is
left of the token budget on prompts, first come first served within a priority. A prompt whose beginning a running
sequence is just computing waits until it can have it from the cache, while others go ahead. Where memory runs short
the last in that order is preempted: its slot is released, and later it gets back what was kept of its keys and
values, or computes its tokens again.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from vattention.core import Chunk
from vattention.engine.preemption import Swapper
from vattention.engine.sequence import Sequence
from vattention.errors import DriverError, OutOfMemoryError, VAttentionError
from vattention.kv.manager import KVManager, Placement

_MOST_PASSED_OVER = 32
"""Waiting sequences that others overtake in one step, at most: each costs a look into the prefix cache."""


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


class Scheduler:
    """Owns the waiting and the running sequences.

    Args:
        manager: the KV cache whose slots and memory are handed out.
        swapper: keeps what preempted sequences have computed.
        max_num_batched_tokens: most tokens in one forward.
        max_logit_rows: most tokens of one chunk where each needs its logits, as for prompt logprobs.
    """

    def __init__(
        self, manager: KVManager, swapper: Swapper, *, max_num_batched_tokens: int, max_logit_rows: int
    ) -> None:
        self._manager = manager
        self._swapper = swapper
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_logit_rows = max_logit_rows
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self.running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for a slot."""
        heapq.heappush(self._waiting, (sequence.priority, sequence))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` run on from what `parent` has computed, sharing its memory; where there is no slot or memory
        for that, it waits and computes its tokens itself.
        """
        assert parent.slot is not None
        try:
            child.slot = self._manager.fork(parent.slot, parent.num_computed)
        except (OutOfMemoryError, DriverError):
            self.add(child)
        else:
            child.num_computed = parent.num_computed
            self.running.append(child)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, running, waiting or neither; its memory is free on return."""
        if sequence.slot is not None:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
            heapq.heapify(self._waiting)
        _free_image(sequence)

    def schedule(self) -> Plan:
        """Plan the next forward and provide its memory. An empty plan means there is nothing to do."""
        plan = Plan()
        while self._manager.excess_nbytes and len(self.running) > 1:
            self._preempt(max(self.running, key=_priority), plan)
        self._continue_running(plan)
        if not plan.preempted:
            self._admit_waiting(plan)
        return plan

    def advance(self, plan: Plan) -> None:
        """The plan's forward is done: its tokens are in their slots, where others may share them."""
        for chunk, sequence in zip(plan.chunks, plan.sequences, strict=True):
            sequence.num_computed = chunk.end
            if chunk.start < sequence.num_promised:
                self._manager.computed(chunk.slot, chunk.end)

    def _continue_running(self, plan: Plan) -> None:
        queue = sorted(self.running, key=_priority)
        decodes = sum(sequence.num_tokens - sequence.num_computed == 1 for sequence in queue)
        for_prompts = max(self._max_num_batched_tokens - decodes, 0)
        while queue and plan.num_tokens < self._max_num_batched_tokens:
            sequence = queue.pop(0)
            remaining = sequence.num_tokens - sequence.num_computed
            count = 1 if remaining == 1 else self._chunk_length(sequence, min(remaining, for_prompts))
            if count == 0:
                continue
            try:
                while not self._provide(sequence, count):
                    victim = queue.pop() if queue else sequence
                    self._preempt(victim, plan)
                    if victim is sequence:
                        break
                else:
                    for_prompts -= count if remaining > 1 else 0
                    self._put(sequence, count, plan)
            except DriverError as error:
                plan.failed.append((sequence, error))

    def _admit_waiting(self, plan: Plan) -> None:
        passed_over: list[Sequence] = []
        while self._waiting and (budget := self._max_num_batched_tokens - plan.num_tokens) > 0:
            sequence = self._waiting[0][1]
            if not self._manager.fits(sequence.num_tokens):
                heapq.heappop(self._waiting)
                plan.failed.append((sequence, self._too_large(sequence)))
                continue
            if self.running and sequence.image is None and self._awaits(sequence):
                if len(passed_over) == _MOST_PASSED_OVER:
                    break
                heapq.heappop(self._waiting)
                passed_over.append(sequence)
                continue
            if self.running and not self._manager.has_room(sequence.num_tokens + 1):
                break
            heapq.heappop(self._waiting)
            try:
                admitted = self._admit(sequence, budget, plan)
            except DriverError as error:
                plan.failed.append((sequence, error))
                continue
            if not admitted and self.running:
                self.add(sequence)
                break
            if not admitted:
                plan.failed.append((sequence, self._too_large(sequence)))
        for sequence in passed_over:
            self.add(sequence)

    def _awaits(self, sequence: Sequence) -> bool:
        """Whether a running sequence is computing what this one could have from the cache soon."""
        tokens = sequence.token_ids(0, sequence.num_tokens)
        return self._manager.awaits(tokens, salt=sequence.request.cache_salt)

    def _admit(self, sequence: Sequence, budget: int, plan: Plan) -> bool:
        """Give a sequence a slot and its first chunk; False where memory is short."""
        request = sequence.request
        try:
            num_cached = self._place(sequence)
        except OutOfMemoryError:
            return False
        if request.num_cached_tokens is None:
            request.num_cached_tokens = num_cached
        self.running.append(sequence)
        count = self._chunk_length(sequence, min(sequence.num_tokens - sequence.num_computed, budget))
        if self._provide(sequence, count):
            self._put(sequence, count, plan)
            plan.num_looked_up_tokens += sequence.num_tokens
            plan.num_cached_tokens += num_cached
            _free_image(sequence)
            return True
        self.running.remove(sequence)
        self._release(sequence)
        return False

    def _place(self, sequence: Sequence) -> int:
        """Give a sequence a slot that holds what its image or the prefix cache has of its tokens; returns how many
        the cache gave.
        """
        token_ids = sequence.token_ids(0, sequence.num_tokens)
        placement, image = self._take(sequence, token_ids), sequence.image
        if image is not None and self._swapper.pays(image, placement.num_cached_tokens):
            # What the cache gave may be others' too: an image needs a slot of its own.
            self._manager.release(placement.slot)
            slot = self._take(sequence, []).slot
            try:
                self._manager.ensure(slot, image.num_tokens, image.num_tokens)
                loaded = self._swapper.load(image, slot)
            except BaseException:
                self._manager.release(slot, ())
                raise
            if loaded:
                sequence.slot, sequence.num_computed = slot, image.num_tokens
                return 0
            self._manager.release(slot, ())
            _free_image(sequence)
            placement = self._take(sequence, token_ids)
        sequence.slot, sequence.num_computed = placement.slot, placement.num_cached_tokens
        sequence.num_promised = sequence.num_tokens
        return placement.num_cached_tokens

    def _take(self, sequence: Sequence, token_ids: list[int]) -> Placement:
        request = sequence.request
        return self._manager.take(
            token_ids, salt=request.cache_salt, max_tokens=len(request.prompt_token_ids) + request.max_tokens
        )

    def _chunk_length(self, sequence: Sequence, wanted: int) -> int:
        return min(wanted, self._max_logit_rows) if _reports_prompt(sequence) else wanted

    def _provide(self, sequence: Sequence, count: int) -> bool:
        """Get memory for the sequence's next tokens; False where it is short."""
        assert sequence.slot is not None
        try:
            self._manager.ensure(sequence.slot, sequence.num_computed, sequence.num_computed + count)
        except OutOfMemoryError:
            return False
        return True

    def _put(self, sequence: Sequence, count: int, plan: Plan) -> None:
        assert sequence.slot is not None
        start, end = sequence.num_computed, sequence.num_computed + count
        last = end == sequence.num_tokens
        num_logits = count if _reports_prompt(sequence) else int(last)
        plan.chunks.append(Chunk(sequence.slot, start, sequence.token_ids(start, end), num_logits))
        plan.sequences.append(sequence)
        plan.num_tokens += count

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        """Take a sequence's memory and let it wait. Alone it fails: it would only come back to the same end."""
        assert sequence.slot is not None
        alone = len(self.running) == 1
        image = None if alone else self._swapper.save(sequence.slot, sequence.num_computed)
        self.running.remove(sequence)
        self._release(sequence)
        sequence.image = image
        if alone:
            plan.failed.append((sequence, self._too_large(sequence)))
        else:
            plan.preempted.append(sequence)
            self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._manager.release(sequence.slot, sequence.token_ids(0, sequence.num_computed))
        sequence.slot, sequence.num_computed, sequence.num_promised = None, 0, 0

    def _too_large(self, sequence: Sequence) -> OutOfMemoryError:
        accounts = self._manager.accounts()
        needed = accounts.mapped_nbytes - accounts.warm_nbytes
        return OutOfMemoryError(
            max(needed, accounts.limit_nbytes + 1),
            accounts.limit_nbytes,
            f"a sequence of {sequence.num_tokens:,} tokens does not fit into the KV cache even alone; "
            "raise kv_memory or free memory on this machine",
        )


def _priority(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.priority


def _free_image(sequence: Sequence) -> None:
    image, sequence.image = sequence.image, None
    if image is not None:
        image.free()


def _reports_prompt(sequence: Sequence) -> bool:
    """Whether logits of prompt tokens are still to be reported."""
    request = sequence.request
    return (
        request.params.prompt_logprobs is not None
        and sequence.index == 0
        and len(request.prompt_logprobs or ()) < len(request.prompt_token_ids)
    )
